"""Weights files are read without executing code, and fit or are refused."""

import hashlib
import http.server
import os
import pickle
import re
import struct
import threading
from dataclasses import replace
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
import torchvision.models as models
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from skltl import CNNFeatureTransformer
from skltl.exceptions import WeightsError, WeightsNotFoundError
from skltl.networks import get_backbone, load_network, random_network, resolve_weights
from skltl.networks._torchvision import list_torchvision
from skltl.networks._weights import fetch


@pytest.fixture(scope="module")
def state():
    """A state dict of torchvision's SqueezeNet 1.1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.squeezenet1_1(weights=None).state_dict()


def load(path, backbone="squeezenet1_1"):
    backbone = get_backbone(backbone)
    return load_network(backbone, resolve_weights(backbone, path), (64, 64))


def as_safetensors(state, folder):
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def as_pt(state, folder):
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def wrapped(state, folder):
    checkpoint = {"epoch": 7, "state_dict": state, "optimizer": {"lr": 0.1}}
    torch.save(checkpoint, folder / "weights.pth")
    return folder / "weights.pth"


def from_parallel_training(state, folder):
    state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": state}, folder / "weights.pth")
    return folder / "weights.pth"


def halved(state, folder):
    return as_safetensors({key: value.half() for key, value in state.items()}, folder)


@pytest.mark.parametrize(
    ("save", "kind"),
    [
        (as_safetensors, str),
        (as_pt, lambda path: path),
        (wrapped, str),
        (from_parallel_training, lambda path: path),
        (halved, str),
    ],
)
def test_state_dicts_in_all_layouts_are_loaded(state, tmp_path, save, kind):
    network = load(kind(save(state, tmp_path)))

    tolerance = 1e-3 if save is halved else 0
    assert network.state().keys() == state.keys()
    for key, value in network.state().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, state[key], rtol=tolerance, atol=tolerance)


def test_a_head_for_another_number_of_classes_is_loaded(tmp_path):
    torch.manual_seed(0)
    model = models.resnet18(weights=None, num_classes=7)
    path = as_safetensors(model.state_dict(), tmp_path)

    network = load(path, "resnet18")

    batch = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network.logits(batch), model.eval()(batch))


def test_old_keys_and_missing_counters_are_accepted(tmp_path):
    torch.manual_seed(0)
    state = models.densenet121(weights=None).state_dict()
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }

    network = load(as_pt(old, tmp_path), "densenet121")

    key = "features.denseblock2.denselayer3.norm1.weight"
    assert torch.equal(network.state()[key], state[key])


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function, argument):
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


def pickled_code(state, path):
    call = Calls(print, "code of the file ran")
    path.write_bytes(pickle.dumps({"weight": call}, protocol=2))


def system_call(state, path):
    call = Calls(os.system, "true")
    path.write_bytes(pickle.dumps({"weight": call}, protocol=2))


def whole_module(state, path):
    torch.save(nn.Linear(2, 2), path)


def truncated(state, path):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:2000])


def text(state, path):
    path.write_text("<html>404</html>")


def empty(state, path):
    path.write_bytes(b"")


def a_list(state, path):
    torch.save([torch.ones(1)], path)


def other_entries(state, path):
    torch.save({**state, "epoch": 3}, path)


def one_key_missing(state, path):
    torch.save({k: v for k, v in state.items() if k != "features.3.squeeze.bias"}, path)


def one_key_too_many(state, path):
    torch.save({**state, "features.99.weight": torch.ones(1)}, path)


def another_shape(state, path):
    torch.save({**state, "features.3.squeeze.bias": torch.ones(5)}, path)


def integers(state, path):
    torch.save({key: value.to(torch.int64) for key, value in state.items()}, path)


def shapes_only(state, path):
    torch.save({key: value.to("meta") for key, value in state.items()}, path)


def expanded_tensor(state, path):
    key = "features.3.squeeze.weight"
    torch.save({**state, key: torch.zeros(1).expand(10**6, 10**6)}, path)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (pickled_code, "more than tensors.*print"),
        (whole_module, "more than tensors.*Linear"),
        (truncated, "not a readable"),
        (text, "not a readable|more than tensors"),
        (empty, "not a readable"),
        (a_list, "no state dict, but a list"),
        (other_entries, "entry 'epoch' is a int"),
        (one_key_missing, "1 missing: features.3.squeeze.bias"),
        (one_key_too_many, "1 unexpected: features.99.weight"),
        (another_shape, r"features.3.squeeze.bias \(5,\) instead of \(16,\)"),
        (integers, "of another dtype: .*int64"),
        (shapes_only, "is a torch.float32 tensor"),
        (expanded_tensor, "is a torch.float32 tensor"),
        (system_call, "more than tensors.*system"),
    ],
)
def test_unusable_torch_files_are_refused(state, tmp_path, save, words, capsys):
    path = tmp_path / "weights.pth"
    save(state, path)

    with pytest.raises(WeightsError, match=words) as info:
        load(path)

    assert str(path) in str(info.value)
    assert "False" not in str(info.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("save", [pickled_code, truncated, text, empty])
def test_unreadable_safetensors_files_are_refused(state, tmp_path, save):
    path = tmp_path / "weights.safetensors"
    save(state, path)

    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load(path)


def test_a_compressed_file_is_refused_before_it_is_unpacked(state, tmp_path):
    plain, packed = as_pt(state, tmp_path), tmp_path / "packed.pt"
    with ZipFile(plain) as old, ZipFile(packed, "w", ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part))
    assert torch.load(packed, weights_only=True).keys() == state.keys()

    with pytest.raises(WeightsError, match="its part '.*' is compressed"):
        load(packed)


@pytest.mark.parametrize("extension", ["safetensors", "pt"])
def test_a_file_far_larger_than_the_network_is_not_read(state, tmp_path, extension):
    save = as_safetensors if extension == "safetensors" else as_pt
    path = save(state, tmp_path)
    os.truncate(path, 200 * 10**9)  # takes no room on the disk

    with pytest.raises(WeightsError, match="has 200,000,000,000 bytes; the network"):
        load(path)


def test_a_duplicate_name_in_a_header_is_refused(tmp_path):
    """Readers disagree on which of the two tensors to use."""
    one = '"weight":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    header = ("{" + one % (0, 4) + "," + one % (4, 8) + "}").encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))

    with pytest.raises(WeightsError, match="a name occurs twice in its header"):
        load(path)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("imagenet1k_v1", "Did you mean"),
        ("IMAGENET1K_V7", "'IMAGENET1K_V1'"),
        ("weights.pkl", "must end in .safetensors, .pt, .pth"),
        ("weights.npz", "must end in"),
    ],
)
def test_unknown_weights_list_the_known_ones(weights, words):
    with pytest.raises(WeightsError, match=words):
        resolve_weights(get_backbone("resnet50"), weights)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(WeightsNotFoundError, match=r"no weights file .*missing\.pt"):
        load(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("pretrained", "IMAGENET1K_V1"),
        ("imagenet", "IMAGENET1K_V1"),
        ("IMAGENET1K_V2", "IMAGENET1K_V2"),
        ("ResNet50_Weights.IMAGENET1K_V2", "IMAGENET1K_V2"),
        ("DEFAULT", "IMAGENET1K_V2"),
    ],
)
def test_names_of_weights_are_those_of_torchvision(weights, name):
    ours = resolve_weights(get_backbone("resnet50"), weights)
    theirs = models.ResNet50_Weights[name]

    assert (ours.name, ours.source) == (name, theirs.url)
    assert list(ours.categories) == theirs.meta["categories"]
    assert ours.preprocessing.shorter_side == theirs.transforms().resize_size[0]


def test_every_published_file_has_a_hash_in_its_name():
    backbones = map(get_backbone, list_torchvision())
    urls = {weights.source for one in backbones for weights in one.weights}

    assert len(urls) > 90
    for url in urls:
        assert re.search(r"-[0-9a-f]{8,}\.pth$", url), url


@pytest.fixture
def web_server(tmp_path):
    """Serve the files of a folder on this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "web")

        def log_message(self, *args):
            pass

    (tmp_path / "web").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path / "web", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def publish(content, folder):
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    return name


def test_a_download_is_checked_and_kept(web_server, hub, capsys):
    folder, address = web_server
    name = publish(b"weights" * 100, folder)

    first = fetch(f"{address}/{name}")
    (folder / name).unlink()  # from now on there is nothing to download
    second = fetch(f"{address}/{name}")

    assert first == second == hub / name
    assert second.read_bytes() == b"weights" * 100
    assert "100%" in capsys.readouterr().err
    assert [path.name for path in hub.iterdir()] == [name]


def test_a_download_with_the_wrong_hash_leaves_nothing(web_server, hub):
    folder, address = web_server
    (folder / "net-0123456789.pth").write_bytes(b"something else")

    with pytest.raises(WeightsNotFoundError, match="invalid hash"):
        fetch(f"{address}/net-0123456789.pth")

    assert list(hub.iterdir()) == []


def test_a_url_without_a_hash_is_refused(hub):
    with pytest.raises(WeightsError, match="'net.pth' has no SHA-256"):
        fetch("http://127.0.0.1:9/net.pth")


def test_a_damaged_file_in_the_hub_folder_is_not_used(state, tmp_path, hub):
    content = as_pt(state, tmp_path).read_bytes()
    name = publish(content, tmp_path)
    hub.mkdir(parents=True)
    (hub / name).write_bytes(content[:-1000])
    backbone = get_backbone("squeezenet1_1")
    published = replace(backbone.weights[0], source=f"https://nowhere.invalid/{name}")

    with pytest.raises(WeightsError, match=f"{name} is not a readable.*Delete it"):
        load_network(backbone, published, (64, 64))


def test_an_offline_error_names_the_file_and_the_folder(hub):
    url = "http://127.0.0.1:9/net-0123456789.pth"

    with pytest.raises(WeightsNotFoundError) as info:
        fetch(url)

    assert url in str(info.value)
    assert str(hub / "net-0123456789.pth") in str(info.value)


def test_imagenet_weights_work_offline_once_they_are_there(state, tmp_path, hub):
    """A file of the right name in the folder of torch.hub is all that is needed."""
    content = as_pt(state, tmp_path).read_bytes()
    name = publish(content, tmp_path)
    hub.mkdir(parents=True)
    (tmp_path / name).rename(hub / name)
    backbone = get_backbone("squeezenet1_1")
    published = replace(backbone.weights[0], source=f"https://nowhere.invalid/{name}")

    network = load_network(backbone, published, (64, 64))

    assert torch.equal(network.state()["features.0.bias"], state["features.0.bias"])


def test_random_weights_are_those_of_torchvision_for_the_seed(state):
    before = torch.get_rng_state()
    network = random_network(get_backbone("squeezenet1_1"), 0, (64, 64))

    assert torch.equal(torch.get_rng_state(), before)
    for key, value in network.state().items():
        assert torch.equal(value, state[key])


def test_google_networks_get_the_normalization_of_torchvision(tmp_path, images):
    """With pretrained weights torchvision normalizes images again in ``forward``."""
    torch.manual_seed(0)
    model = models.googlenet(
        weights=None, aux_logits=False, init_weights=False, transform_input=True
    ).eval()
    path = as_safetensors(model.state_dict(), tmp_path)
    transformer = CNNFeatureTransformer("googlenet", weights=path, precision="float32")
    transforms = models.GoogLeNet_Weights.IMAGENET1K_V1.transforms()
    outputs = []
    model.inception5b.register_forward_hook(
        lambda *args: outputs.append(args[2].clone())
    )

    features = transformer.fit_transform(images[:2])
    with torch.inference_mode():
        model(torch.stack([transforms(Image.fromarray(one)) for one in images[:2]]))

    by_hand = outputs[0].mean((2, 3)).numpy()
    scale = np.abs(by_hand).max()
    np.testing.assert_allclose(features / scale, by_hand / scale, atol=1e-4)
