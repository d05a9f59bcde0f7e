"""Export of fitted estimators: a torch module, ONNX and OpenVINO."""

from skltl.export._module import ExportedNetwork, to_torch
from skltl.export._onnx import export_onnx
from skltl.export._openvino import export_openvino

__all__ = ["ExportedNetwork", "export_onnx", "export_openvino", "to_torch"]
