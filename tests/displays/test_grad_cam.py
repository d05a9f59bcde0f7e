"""Class activation maps match their definition, for each kind of classifier."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC, NuSVC
from small_vit import small_vit, small_vit_module
from tiny_classifier import classifier
from torch import nn

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    GradCAMDisplay,
    Preprocessing,
    PretrainedCNNClassifier,
    TransferClassifier,
    make_feature_pipeline,
)
from skltl.displays._grad_cam import grad_cam
from skltl.networks import get_backbone, load_network, resolve_weights

TINY = {"layer": "block3", "image_size": 32, "precision": "float32"}


@pytest.fixture(scope="module")
def squares():
    """Gray noise; two thirds of the images have a red square, left or right."""
    rng = np.random.default_rng(0)
    images = rng.integers(90, 160, size=(24, 64, 64, 3), dtype=np.uint8)
    images[1::3, 22:42, 4:24] = (250, 20, 20)
    images[2::3, 22:42, 40:60] = (250, 20, 20)
    return images


def tiny_pipeline(kind, **parameters):
    return make_feature_pipeline("tiny", kind, **TINY, **parameters)


def tiny_pretrained(**parameters):
    return PretrainedCNNClassifier("tiny", precision="float32", **parameters)


@pytest.fixture(scope="module")
def fitted_pipeline(squares):
    """A linear classifier that distinguishes images with a square (1) from others."""
    pipeline = tiny_pipeline("softmax").set_params(feat__image_size=64)
    return pipeline.fit(squares, np.arange(24) % 3 > 0)


def network_input(images, preprocessing):
    """Return the input of a network for 8-bit images, computed by torch alone."""
    crops = np.stack([preprocessing.crop(image) for image in images])
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std


def expected_map(feature_map, score, size):
    """Return the map (size, size) of a score, as Selvaraju et al. define it."""
    leaf = feature_map[None].clone().requires_grad_(True)
    score(leaf).backward()
    weights = leaf.grad.mean(dim=(2, 3), keepdim=True)
    activation = (weights * leaf.detach()).sum(dim=1, keepdim=True).relu()
    return torch.nn.functional.interpolate(
        activation / activation.max().clamp(min=1e-30), (size, size), mode="bilinear"
    )[0, 0].numpy()


def own_scores(fitted, images, labels):
    """Return the classifier's decision value of a label for each image."""
    decision = fitted.decision_function(images)
    columns = [fitted.classes_.tolist().index(label) for label in labels]
    if decision.ndim == 1:
        return np.where(np.array(columns) == 1, decision, -decision)
    return decision[np.arange(len(images)), columns]


def test_linear_classifier_localizes_an_object(squares, fitted_pipeline):
    right = np.arange(24)[2::3]
    left = right - 1

    for numbers, half, other in (
        (left, np.s_[:, :, :32], np.s_[:, :, 32:]),
        (right, np.s_[:, :, 32:], np.s_[:, :, :32]),
    ):
        _, maps, _, _, _ = grad_cam(fitted_pipeline, squares[numbers], True)

        assert (maps[half].sum(axis=(1, 2)) > maps[other].sum(axis=(1, 2))).all()
        assert maps.shape == (8, 64, 64)
        assert maps.min() >= 0
        assert maps.max() <= 1


def test_for_averaged_features_coefficients_weight_the_channels(
    squares, fitted_pipeline
):
    """Class activation maps of Zhou et al., 2016."""
    scaler, linear = (step for _, step in fitted_pipeline.steps[1:])
    transformer = CNNFeatureTransformer("tiny", pooling="flatten", **TINY)
    transformer.set_params(image_size=64)
    feature_maps = transformer.fit_transform(squares[:3]).reshape(3, 192, 8, 8)
    coefficients = linear.coef_[0] / scaler.scale_
    expected = np.einsum("c,nchw->nhw", coefficients, feature_maps).clip(min=0)
    expected /= expected.max(axis=(1, 2), keepdims=True)

    _, maps, _, _, _ = grad_cam(fitted_pipeline, squares[:3], np.ones(3, dtype=bool))

    expected = torch.nn.functional.interpolate(
        torch.from_numpy(expected)[:, None], (64, 64), mode="bilinear"
    )
    assert_allclose(maps, expected[:, 0], atol=1e-4)


LABELS = {
    "two strings": ["tulip", "rose"],
    "three strings": ["tulip", "rose", "lily"],
    "three integers": [7, -1, 3],
    "two integers": [5, 2],
}

CLASSIFIERS = {
    "svm": lambda: tiny_pipeline("svm", random_state=0),
    "softmax": lambda: tiny_pipeline("softmax"),
    "ovr": lambda: tiny_pipeline("ovr"),
    "ridge": lambda: tiny_pipeline(RidgeClassifier()),
    "max pooling": lambda: tiny_pipeline("softmax", pooling="max"),
    "grid pooling": lambda: tiny_pipeline("softmax", pooling=2),
    "no scaler": lambda: make_pipeline(
        CNNFeatureTransformer("tiny", **TINY), LogisticRegression(max_iter=5000)
    ),
    "passthrough": lambda: tiny_pipeline("softmax").set_params(scale="passthrough"),
    "search in a pipeline": lambda: tiny_pipeline(
        GridSearchCV(LogisticRegression(max_iter=500), {"C": [0.1]}, cv=2)
    ),
    "search": lambda: GridSearchCV(
        tiny_pipeline("softmax"), {"feat__layer": ["block2"]}, cv=2
    ),
    "tuned": lambda: tuned_classifier(),
    "tuned, hidden units": lambda: tuned_classifier(hidden_units=(6,)),
    "tuned, convolutions": lambda: tuned_classifier(conv_channels=(8,)),
    "tuned, search": lambda: GridSearchCV(tuned_classifier(), {"unfreeze": [1]}, cv=2),
    "pretrained, learned map": lambda: tiny_pretrained(class_map="learn"),
    "transfer, extract": lambda: transfer_classifier("extract"),
    "transfer, finetune_top": lambda: transfer_classifier("finetune_top"),
    "transfer, as_is": lambda: transfer_classifier("as_is"),
}

# Every kind with one set of labels, and every way to compute scores with all of them.
CASES = [(kind, list(LABELS)[n % 4]) for n, kind in enumerate(CLASSIFIERS)]
CASES += [
    (kind, labels)
    for kind in ("svm", "ovr", "tuned", "pretrained, learned map")
    for labels in LABELS
    if (kind, labels) not in CASES
]


def tuned_classifier(**parameters):
    settings = {"image_shape": None, "head_epochs": 1, "finetune_epochs": 1}
    return classifier(**settings | parameters)


def transfer_classifier(strategy):
    transformer = CNNFeatureTransformer("tiny", image_size=32, precision="float32")
    return TransferClassifier(transformer, strategy=strategy, random_state=0)


@pytest.mark.parametrize(("kind", "labels"), CASES)
def test_score_is_the_decision_value_of_the_label(kind, labels, squares):
    y = np.resize(LABELS[labels], 24)
    fitted = CLASSIFIERS[kind]().fit(squares, y)
    wanted = np.resize(LABELS[labels][::-1], 6).tolist()

    _, _, found, scores, _ = grad_cam(fitted, squares[:6], wanted)

    expected = own_scores(fitted, squares[:6], wanted)
    assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
    assert found.tolist() == wanted


CLASS_MAP = {"b": [3, 5], "a": [7, 1, 0], "c": [11]}


@pytest.mark.parametrize("class_map", [None, CLASS_MAP], ids=["names", "class map"])
def test_pretrained_network_matches_its_last_feature_map(class_map, images):
    images = images[:4]
    fitted = tiny_pretrained(class_map=class_map).fit(images)
    backbone = get_backbone("tiny")
    weights = resolve_weights(backbone, "pretrained")
    network = load_network(backbone, weights, backbone.preprocessing.size)
    blocks = list(network.blocks.items())
    last = list(network.blocks).index(network.layers["block4"]) + 1
    rest = nn.Sequential(*(block for _, block in blocks[last:]), network.head)
    with torch.no_grad():
        feature_maps = network_input(images, backbone.preprocessing)
        for _, block in blocks[:last]:
            feature_maps = block(feature_maps)
        best = rest(feature_maps).argmax(dim=1).numpy()
    names = np.array(backbone.weights[0].categories)
    members = [CLASS_MAP["a"]] * 4 if class_map else best[:, None].tolist()
    wanted = ["a"] * 4 if class_map else names[best].tolist()

    _, maps, _, scores, _ = grad_cam(fitted, images, wanted)
    _, _, predicted, highest, _ = grad_cam(fitted, images)

    for feature_map, columns, found in zip(feature_maps, members, maps, strict=True):

        def score(leaf, columns=columns):
            return rest(leaf)[0, columns].logsumexp(0)

        assert_allclose(found, expected_map(feature_map, score, 80), atol=1e-3)
    assert maps.max() > 0.9
    assert_allclose(scores, own_scores(fitted, images, wanted), rtol=1e-3, atol=1e-4)
    decision = fitted.decision_function(images)
    assert_allclose(highest, decision.max(axis=1), rtol=1e-3, atol=1e-4)
    assert_array_equal(predicted, fitted.predict(images))


def test_map_precedes_fully_connected_blocks(images):
    conv = nn.Conv2d(3, 4, 5, stride=2)
    fc = nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 6), nn.Tanh())
    head = nn.Linear(6, 3)
    preprocessing = Preprocessing(16)
    backbone = Backbone.from_blocks(
        "mine", {"conv": conv, "fc": fc}, head, preprocessing=preprocessing
    )
    fitted = PretrainedCNNClassifier(backbone, precision="float32").fit(images)
    with torch.no_grad():
        feature_maps = conv(network_input(images[:3], preprocessing))

    _, maps, _, scores, _ = grad_cam(fitted, images[:3], 1)

    assert_allclose(scores, own_scores(fitted, images[:3], [1, 1, 1]), rtol=1e-3)
    for feature_map, found in zip(feature_maps, maps, strict=True):
        expected = expected_map(feature_map, lambda leaf: head(fc(leaf))[0, 1], 16)
        assert_allclose(found, expected, atol=1e-3)


def test_map_of_a_classifier_on_vectors_precedes_them(squares):
    """The classifier uses a fully connected layer, behind the last feature map."""
    y = np.arange(24) % 3
    conv = nn.Conv2d(3, 4, 5, stride=2)
    fc = nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 6), nn.Tanh())
    preprocessing = Preprocessing(16)
    backbone = Backbone.from_blocks(
        "mine", {"conv": conv, "fc": fc}, preprocessing=preprocessing
    )
    fitted = make_feature_pipeline(
        backbone, "softmax", layer="fc", precision="float32"
    ).fit(squares, y)
    scaler, linear = fitted["scale"], fitted["softmax"]

    _, maps, _, scores, _ = grad_cam(fitted, squares[:3], 1)

    weight, shift, scale = (
        torch.from_numpy(one).float()
        for one in (linear.coef_[1], scaler.mean_, scaler.scale_)
    )
    with torch.no_grad():
        feature_maps = conv(network_input(squares[:3], preprocessing))

    def score(leaf):
        return ((fc(leaf)[0] - shift) / scale) @ weight

    for feature_map, found in zip(feature_maps, maps, strict=True):
        assert_allclose(found, expected_map(feature_map, score, 16), atol=1e-3)
    decisions = fitted.decision_function(squares[:3])
    assert_allclose(scores, decisions[:, 1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_map_of_a_vgg_precedes_its_fully_connected_layers(images):
    fitted = PretrainedCNNClassifier(
        "vgg11", weights=None, random_state=0, image_size=64, precision="float32"
    ).fit(images)
    wanted = fitted.classes_[[5, 500, 999]].tolist()

    _, _, _, scores, _ = grad_cam(fitted, images[:3], wanted)

    expected = own_scores(fitted, images[:3], wanted)
    assert_allclose(scores, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("n_classes", "settings"),
    [(2, {}), (3, {}), (3, {"conv_channels": (8,), "hidden_units": (6,)})],
    ids=["two classes", "three classes", "layers in the head"],
)
def test_tuned_network_matches_its_head(n_classes, settings, squares):
    y = np.resize(["tulip", "rose", "lily"][:n_classes], 24)
    fitted = tuned_classifier(**settings).fit(squares, y)
    with torch.no_grad():
        feature_maps = network_input(squares[:3], fitted.preprocessing_)
        for block in fitted.network_.blocks.values():
            feature_maps = block(feature_maps)
    column = fitted.classes_.tolist().index("rose")
    signs = torch.full((n_classes,), -1.0 if n_classes == 2 else 0.0).double()
    signs[column] = 1

    _, maps, _, _, _ = grad_cam(fitted, squares[:3], "rose")

    for feature_map, found in zip(feature_maps.double(), maps, strict=True):
        expected = expected_map(
            feature_map, lambda leaf: fitted.head_(leaf)[0] @ signs, 32
        )
        assert_allclose(found, expected, atol=1e-4)


def vit_map(tokens, rest, score):
    """Return the map of a score of tokens (1, 17, 32), of which 4 x 4 are patches."""
    leaf = tokens.clone().requires_grad_(True)
    score(rest(leaf)).backward()
    gradient, patches = leaf.grad[0, 1:], leaf.detach()[0, 1:]
    weights = gradient.mean(dim=0)
    activation = (patches @ weights).relu().reshape(1, 1, 4, 4)
    scaled = activation / activation.max().clamp(min=1e-30)
    return torch.nn.functional.interpolate(scaled, (32, 32), mode="bilinear")[0, 0]


@pytest.mark.parametrize("pooling", ["avg", "cls", "auto"])
def test_maps_of_a_transformer_are_those_of_its_patches(pooling, squares):
    """Behind the last attention, the class token depends on no patch."""
    pipeline = make_feature_pipeline(
        small_vit(), "softmax", pooling=pooling, precision="float32"
    ).fit(squares, np.arange(24) % 3)
    scaler, linear = (step for _, step in pipeline.steps[1:])
    coef, mean, scale = (
        torch.tensor(one).float()
        for one in (linear.coef_[2], scaler.mean_, scaler.scale_)
    )
    encoder = small_vit_module().eval().requires_grad_(False).encoder

    def score(tokens):
        features = tokens[:, 1:].mean(1) if pooling == "avg" else tokens[:, 0]
        return ((features - mean) / scale @ coef).sum()

    def rest(tokens):
        return encoder.ln(encoder.layers[3](tokens))

    _, maps, _, scores, _ = grad_cam(pipeline, squares[:3], 2)

    network = small_vit_module().eval()
    outputs = {}
    network.encoder.layers[2].register_forward_hook(
        lambda module, args, output: outputs.update(tokens=output)
    )
    with torch.no_grad():
        network(network_input(squares[:3], small_vit().preprocessing))
        normalized = rest(outputs["tokens"])
    if pooling == "avg":
        tokens, rest = normalized, torch.nn.Identity()
    else:
        tokens = outputs["tokens"]
    for number in range(3):
        expected = vit_map(tokens[number : number + 1], rest, score)
        assert_allclose(maps[number], expected, atol=1e-4)
    decisions = pipeline.decision_function(squares[:3])[:, 2]
    assert_allclose(scores, decisions, rtol=1e-3, atol=1e-4)


def test_maps_of_a_fine_tuned_transformer_have_its_scores(squares):
    fitted = FineTunedCNNClassifier(
        small_vit(), pooling="auto", unfreeze=1, head_epochs=1, finetune_epochs=1,
        precision="float32", random_state=0,
    ).fit(squares, np.arange(24) % 3)  # fmt: skip

    _, maps, labels, scores, _ = grad_cam(fitted, squares[:3])

    assert (maps.max(axis=(1, 2)) > 0).all()
    expected = own_scores(fitted, squares[:3], labels)
    assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)


def test_classifiers_without_a_feature_map_are_refused(squares):
    y = np.arange(24) % 2
    blocks = {
        "conv": nn.Conv2d(3, 2, 3),
        "fc": nn.Sequential(nn.Flatten(), nn.Linear(2 * 14 * 14, 5)),
    }
    backbone = Backbone.from_blocks("mine", blocks, preprocessing=Preprocessing(16))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    only_vectors = Backbone.from_blocks(
        "flat", {"fc": flat}, preprocessing=Preprocessing(16)
    )
    vectors = make_feature_pipeline(only_vectors, "softmax").fit(squares, y)
    two_layers = make_feature_pipeline(backbone, "softmax", layer=["conv", "fc"])
    forest = make_feature_pipeline(backbone, RandomForestClassifier(3)).fit(squares, y)

    with pytest.raises(ValueError, match="no layer up to 'fc' of 'flat' returns one"):
        grad_cam(vectors, squares[:2])
    with pytest.raises(ValueError, match="2 layers, conv, fc: .* single layer"):
        grad_cam(two_layers.fit(squares, y), squares[:2])
    with pytest.raises(ValueError, match="RandomForestClassifier is not a linear"):
        grad_cam(forest, squares[:2])
    with pytest.raises(ValueError, match="classifier; got RandomForestClassifier"):
        grad_cam(forest[-1], squares[:2])
    regressor = make_feature_pipeline("tiny", regressor="ridge", image_size=32)
    with pytest.raises(ValueError, match="classifier; got Ridge"):
        grad_cam(regressor.fit(squares, np.arange(24.0)), squares[:2])


@pytest.mark.parametrize("X", ["folder/rose.jpg", None, (path for path in "ab")])
def test_what_is_no_sequence_of_images_is_refused(X, squares):
    fitted = make_feature_pipeline("tiny", "softmax", image_size=32)
    fitted.fit(squares, np.arange(24) % 2)
    with pytest.raises(TypeError, match="X (is a single path|must be a list)"):
        GradCAMDisplay.from_estimator(fitted, X)


PAIRWISE = {"kernel": "linear", "decision_function_shape": "ovo"}


@pytest.mark.parametrize("n_labels", [2, 3])
@pytest.mark.parametrize("last", ["ovr", "softmax", "fine-tuned"])
def test_maps_of_a_label_are_those_of_a_classifier_of_this_label(
    last, n_labels, squares
):
    """Its score is the log odds of the label."""
    kind = np.arange(24) % 3
    y = np.column_stack([kind > 0, kind == 2, kind == 0]).astype(int)[:, :n_labels]
    name = "softmax" if last == "fine-tuned" else last
    settings = {"image_size": 32, "precision": "float32"}
    pipeline = make_feature_pipeline("tiny", name, **settings)
    alone = clone(pipeline).fit(squares, y[:, 1])
    several = pipeline.fit(squares, y)
    if last == "fine-tuned":
        several = FineTunedCNNClassifier.from_pipeline(pipeline)

    _, maps, _, scores, _ = grad_cam(several, squares[:4], labels=1)
    _, expected, _, odds, _ = grad_cam(alone, squares[:4], labels=1)

    assert_allclose(scores, several.decision_function(squares[:4])[:, 1], atol=1e-4)
    assert_allclose(scores, odds, rtol=1e-3, atol=1e-4)
    assert_allclose(maps, expected, rtol=1e-3, atol=1e-5)
    _, _, labels, _, _ = grad_cam(several, squares[:4])
    best = several.decision_function(squares[:4]).argmax(axis=1)
    assert_array_equal(labels, best)


@pytest.mark.parametrize(
    ("last", "n_labels"),
    [
        (SVC(**PAIRWISE), 1),
        (NuSVC(**PAIRWISE, nu=0.2), 1),
        (RidgeClassifier(), 2),
        (RidgeClassifier(), 3),
    ],
    ids=lambda one: type(one).__name__ if hasattr(one, "fit") else one,
)
def test_classifiers_without_one_decision_per_class_are_refused(
    last, n_labels, squares
):
    """One-vs-one or multilabel decisions of three pairs or labels have equal shapes."""
    kind = np.arange(24) % 3
    y = np.column_stack([kind > 0, kind == 2, kind == 0])[:, :n_labels].astype(int)
    pipeline = make_pipeline(CNNFeatureTransformer("tiny", image_size=32), last)
    pipeline.fit(squares, kind if n_labels == 1 else y)

    for use in (
        FineTunedCNNClassifier.from_pipeline,
        lambda fitted: grad_cam(fitted, squares[:2]),
    ):
        with pytest.raises(ValueError, match=f"{type(last).__name__} .*coefficients"):
            use(pipeline)


def test_labels_are_checked(squares):
    names = np.resize(["cup", "key"], 24)
    pipeline = tiny_pipeline("svm").fit(squares, names)

    for labels in ("key", ["key", "key"], [["key"], ["key"]]):
        _, _, found, _, _ = grad_cam(pipeline, squares[:2], labels)
        assert found.tolist() == ["key", "key"]
    for unknown in (["cup", "keys"], [0, 1]):
        with pytest.raises(ValueError, match="^('keys'|0) is"):
            grad_cam(pipeline, squares[:2], unknown)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        grad_cam(pipeline, squares[:2], ["cup"])


def test_images_are_the_crops_of_the_network(squares):
    wide = np.concatenate([squares, squares], axis=2)  # twice as wide as high
    pipeline = tiny_pipeline("softmax").fit(wide, np.arange(24) % 2)

    images, _, _, _, _ = grad_cam(pipeline, wide[:2])

    crop = pipeline[0].preprocessing_.crop
    assert_array_equal(images, [crop(image) for image in wide[:2]])


def test_global_settings_of_torch_change_nothing(squares, fitted_pipeline):
    _, expected, _, _, _ = grad_cam(fitted_pipeline, squares[:2])
    state = torch.get_rng_state()

    with torch.no_grad(), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            _, maps, _, _, _ = grad_cam(fitted_pipeline, squares[:2])
        finally:
            torch.set_default_dtype(torch.float32)

    assert_allclose(maps, expected, atol=1e-7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["svm", "ovr"])
def test_pipeline_with_pandas_output_raises_no_warning(kind, squares):
    with config_context(transform_output="pandas"):
        pipeline = tiny_pipeline(kind, random_state=0).fit(squares, np.arange(24) % 2)

        _, _, _, scores, _ = grad_cam(pipeline, squares[:2], [0, 1])
        tuned = FineTunedCNNClassifier.from_pipeline(pipeline)

        decision = pipeline.decision_function(squares[:2])
        found = tuned.decision_function(squares[:2])
    assert_allclose(scores, decision * [-1, 1], rtol=1e-4, atol=1e-5)
    assert_allclose(found, decision, rtol=1e-4, atol=1e-5)


def test_class_without_categories_does_not_affect_the_others(squares):
    y = np.arange(24) % 3
    fitted = tiny_pretrained(class_map="learn")
    fitted.fit(squares, y, sample_weight=(y != 2).astype(float))

    _, maps, _, scores, _ = grad_cam(fitted, squares[:6], y[:6])

    decision = fitted.decision_function(squares[:6])[np.arange(6), y[:6]]
    assert_allclose(scores, decision, rtol=1e-4)
    assert (maps[y[:6] < 2].max(axis=(1, 2)) > 0.5).all()
    assert (maps[y[:6] == 2] == 0).all()


@pytest.mark.parametrize("side_by_side", [True, False])
def test_display_plots_the_maps_over_the_images(side_by_side, squares, fitted_pipeline):
    images, maps, labels, scores, _ = grad_cam(fitted_pipeline, squares[:4])

    display = GradCAMDisplay.from_estimator(
        fitted_pipeline, squares[:4], n_columns=2, side_by_side=side_by_side
    )

    assert_array_equal(display.labels, fitted_pipeline.predict(squares[:4]))
    assert_array_equal(display.scores, scores)
    assert display.figure_ is display.axes_[0].figure
    assert display.figure_.get_suptitle() == ""
    assert display.axes_[0].get_gridspec().get_geometry() == (2, 2)
    proba = fitted_pipeline.predict_proba(squares[:4]).max(axis=1)
    for n, ax in enumerate(display.axes_):
        left, *below, above = ax.get_images()
        assert (left, above) == (display.ims_[n], display.map_ims_[n])
        assert_array_equal(left.get_array(), images[n])
        assert_array_equal(above.get_array(), maps[n])
        assert above.get_clim() == (0, 1)
        assert above.get_alpha() == 0.5
        assert ax.get_title() == f"{labels[n]} p={proba[n]:.2f}"
        if side_by_side:  # the map is over a copy of the image on its right
            (below,) = below
            assert_array_equal(below.get_array(), images[n])
            assert below.get_extent() == above.get_extent()
            assert left.get_extent()[1] < below.get_extent()[0]
            assert ax.get_xlim() == (left.get_extent()[0], below.get_extent()[1])
        else:
            assert below == []


@pytest.mark.parametrize("kind", ["softmax", "ovr", "tuned", "transfer, as_is"])
def test_probability_is_that_of_the_class_of_the_map(kind, squares):
    y = np.resize(["rose", "iris", "lily"], 24)
    fitted = CLASSIFIERS[kind]().fit(squares, y)
    column = fitted.classes_.tolist().index("iris")

    display = GradCAMDisplay.from_estimator(fitted, squares[:5], "iris")

    proba = fitted.predict_proba(squares[:5])[:, column]
    assert_allclose(display.proba, proba, rtol=1e-5)
    titles = [ax.get_title() for ax in display.axes_]
    assert titles == [f"iris p={one:.2f}" for one in proba]


def test_probability_is_that_of_the_label_of_the_map(squares):
    kind = np.arange(24) % 3
    y = np.column_stack([kind > 0, kind == 2, kind == 0]).astype(int)
    fitted = tiny_pipeline("softmax").fit(squares, y)

    display = GradCAMDisplay.from_estimator(fitted, squares[:4], [0, 1, 2, 0])

    proba = fitted.predict_proba(squares[:4])[np.arange(4), [0, 1, 2, 0]]
    assert_allclose(display.proba, proba, rtol=1e-5)


def test_without_probabilities_titles_have_the_decision_value(squares):
    y = np.resize(["cup", "key"], 24)
    fitted = tiny_pipeline("svm").fit(squares, y)

    display = GradCAMDisplay.from_estimator(fitted, squares[:3], "cup")

    assert display.proba is None
    for ax, value in zip(
        display.axes_, -fitted.decision_function(squares[:3]), strict=True
    ):
        name, number = ax.get_title().split(" score=")
        assert name == "cup"
        assert abs(float(number) - value) < 0.006  # two decimals


def test_first_images_are_plotted(squares, fitted_pipeline, network_counts):
    y = np.arange(24) % 3 > 0

    display = GradCAMDisplay.from_estimator(fitted_pipeline, list(squares), y)

    assert len(display.axes_) == 12
    assert display.figure_.get_suptitle() == "first 12 of 24 images"
    assert_array_equal(display.labels, y[:12])
    assert max(network_counts) <= 12
    _, axes = plt.subplots(2, 7)
    given = GradCAMDisplay.from_estimator(fitted_pipeline, squares[:14], axes=axes)
    assert len(given.axes_) == 14
    few = GradCAMDisplay.from_estimator(fitted_pipeline, squares, True, n_images=2)
    assert_array_equal(few.images, display.images[:2])
    with pytest.raises(ValueError, match="n_images=0"):
        GradCAMDisplay.from_estimator(fitted_pipeline, squares, n_images=0)
    with pytest.raises(ValueError, match="inconsistent numbers"):
        GradCAMDisplay.from_estimator(fitted_pipeline, squares, y[:14])


def test_display_accepts_axes_and_keyword_arguments():
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    display = GradCAMDisplay(images, np.ones((2, 8, 8)), ["cat", "dog"])
    _, axes = plt.subplots(1, 2)

    display.plot(axes=axes, cmap="viridis", alpha=0.2, vmax=2)

    assert display.axes_.tolist() == axes.tolist()
    assert display.map_ims_[1].get_cmap().name == "viridis"
    assert display.map_ims_[1].get_alpha() == 0.2
    assert display.map_ims_[1].get_clim() == (0, 2)
    with pytest.raises(ValueError, match="Expected axes to have 2 axes, got 1"):
        display.plot(axes=axes[0])
    with pytest.raises(ValueError, match="n_columns=0 must be at least 1"):
        display.plot(n_columns=0)
