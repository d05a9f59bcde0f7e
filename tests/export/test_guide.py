"""The code of the guide's page "Deployment" does what the page says."""

import numpy as np
import pytest
from guide_code import GUIDE, blocks_of, create_photographs, run

for name in ("onnx", "onnxruntime", "onnxscript", "openvino"):
    pytest.importorskip(name)

# Of releases of torch that save and load exported programs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]


def test_all_ways_predict_what_the_pipeline_predicts(tmp_path, monkeypatch):
    create_photographs(tmp_path)
    monkeypatch.chdir(tmp_path)

    blocks = blocks_of((GUIDE / "deployment.rst").read_text())
    found = run([block for block in blocks if "mlflow" not in block], {})

    # Exports are of float32, which is not the precision of every processor.
    classifier = found["classifier"].set_params(feat__precision="float32")
    paths = found["images"].data
    np.testing.assert_array_equal(found["predicted"], classifier.predict(paths))
    all_crops = found["crop_images"](paths, found["preprocessing"])
    loaded = found["loaded"](found["torch"].from_numpy(all_crops))
    np.testing.assert_allclose(
        loaded["probabilities"].numpy(), classifier.predict_proba(paths), atol=1e-3
    )
    assert found["answer"] == "sky"
    expected = classifier.predict_proba(["photographs/sky/00.jpg"])
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-3)
    assert found["names"][found["index_of_openvino"][0]] == "sky"
