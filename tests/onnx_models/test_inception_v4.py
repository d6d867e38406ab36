"""The Inception V4 builder against the published architecture and against PyTorch."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from rectgrad_ref.errors import InvalidModel
from rectgrad_ref.onnx_models import inception_v4

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def state_dict() -> Arrays:
    """Seeded weights of the right scale with a batch normalisation that is not the identity."""
    rng = np.random.default_rng(0)

    def array(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if len(shape) > 1:
            spread = np.float32(np.sqrt(2 / np.prod(shape[1:])))
            return rng.standard_normal(shape, dtype=np.float32) * spread
        positive = name.endswith(("bn.weight", "running_var"))
        low, high = (0.5, 1.5) if positive else (-0.2, 0.2)
        return rng.uniform(low, high, shape).astype(np.float32)

    return {name: array(name, shape) for name, shape in inception_v4.parameter_shapes().items()}


@pytest.fixture(scope="module")
def model(state_dict: Arrays) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(inception_v4.build_model(state_dict))


def run_all(model: onnx.ModelProto, image: NDArray[np.float32]) -> Arrays:
    """Every value that the model computes, by name."""
    ort = pytest.importorskip("onnxruntime")
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    names = [node.output[0] for node in model.graph.node]
    exposed.graph.ClearField("output")
    exposed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    session = ort.InferenceSession(exposed.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"image": image}), strict=True))


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Name → (C, H, W) or (C,) of every value."""
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)[1:]
        for value in (*model.graph.value_info, *model.graph.output)
    }


def test_is_valid_onnx(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)


def test_operators_are_those_of_the_model_zoo(model: onnx.ModelProto) -> None:
    # The counts that the ONNX Model Zoo states for its export of timm's inception_v4.
    assert Counter(node.op_type for node in model.graph.node) == {
        "Conv": 149,
        "Relu": 149,
        "Concat": 19,
        "AveragePool": 14,
        "MaxPool": 4,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }


def test_number_of_parameters(model: onnx.ModelProto) -> None:
    trainable = {
        name: np.prod(shape)
        for name, shape in inception_v4.parameter_shapes().items()
        if "running" not in name
    }
    assert sum(trainable.values()) == 42_679_816  # as the ONNX Model Zoo states
    folded = sum(np.prod(initializer.dims) for initializer in model.graph.initializer)
    assert folded == 42_648_232


def test_number_of_relu_units(model: onnx.ModelProto) -> None:
    shape = shapes(model)
    relus = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    assert sum(np.prod(shape[name]) for name in relus) == 15_089_184


def test_shapes_of_the_blocks_are_those_of_the_paper(model: onnx.ModelProto) -> None:
    # Figures 3 and 9 of arXiv:1602.07261.
    shape = shapes(model)
    paper = {
        "features.0.relu": (32, 149, 149),
        "features.1.relu": (32, 147, 147),
        "features.2.relu": (64, 147, 147),
        "features.3": (160, 73, 73),
        "features.4": (192, 71, 71),
        **{f"features.{i}": (384, 35, 35) for i in range(5, 10)},
        **{f"features.{i}": (1024, 17, 17) for i in range(10, 18)},
        **{f"features.{i}": (1536, 8, 8) for i in range(18, 22)},
        "flatten": (1536,),
        "logits": (1000,),
    }
    assert {name: shape[name] for name in paper} == paper


def test_values_are_named_after_the_module(model: onnx.ModelProto) -> None:
    names = {node.output[0] for node in model.graph.node}
    assert {
        "features.6.branch1.0.conv",
        "features.6.branch1.0.relu",
        "features.6.branch3.0",
        "features.3.maxpool",
        "features.3.conv.conv",
        "features.19.branch2_3b.relu",
    } <= names
    assert all(node.name for node in model.graph.node)


def test_image_metadata(model: onnx.ModelProto) -> None:
    assert {prop.key: prop.value for prop in model.metadata_props} == {
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.ColorSpaceGamma": "SRGB",
        "Image.NominalPixelRange": "Normalized_1_1",
    }
    assert model.graph.input[0].type.denotation == "IMAGE"


def test_number_of_classes_is_that_of_the_weights(state_dict: Arrays) -> None:
    with_background = {
        **state_dict,
        "last_linear.weight": np.zeros((1001, 1536), np.float32),
        "last_linear.bias": np.zeros(1001, np.float32),
    }
    model = inception_v4.build_model(with_background)
    assert model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 1001


def test_batch_counters_are_ignored(state_dict: Arrays) -> None:
    counter = {"features.0.bn.num_batches_tracked": np.array(7)}
    inception_v4.check_state_dict({**state_dict, **counter})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.0.conv.weight": None}, r"1 missing, .* features.0.conv.weight \(None given"),
        ({"head.weight": np.zeros(2)}, r"1 unknown, .* head.weight \(\(2,\) given"),
        ({"features.0.bn.bias": np.zeros(31)}, r"1 of another shape, .* \(32,\) expected"),
        ({"last_linear.bias": np.zeros(1001)}, r"another shape, .* last_linear.weight"),
        ({"last_linear.bias": np.zeros(())}, r"another shape, .* last_linear.bias"),
    ],
)
def test_other_weights_are_refused(state_dict: Arrays, change: Any, message: str) -> None:
    changed = {name: a for name, a in {**state_dict, **change}.items() if a is not None}
    with pytest.raises(InvalidModel, match=message):
        inception_v4.build_model(changed)


def test_every_layer_agrees_with_pytorch(state_dict: Arrays) -> None:
    # Of the small sizes 107 is one at which the last maps still have more than one cell.
    assert_agrees_with_pytorch(state_dict, 107)


@pytest.mark.slow
def test_every_layer_agrees_with_pytorch_at_full_size(state_dict: Arrays) -> None:
    assert_agrees_with_pytorch(state_dict, inception_v4.IMAGE_SIZE)


def assert_agrees_with_pytorch(state_dict: Arrays, image_size: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    image = rng.uniform(-1, 1, (2, 3, image_size, image_size)).astype(np.float32)
    values = run_all(inception_v4.build_model(state_dict, image_size=image_size), image)
    expected = pytorch_values(state_dict, torch.from_numpy(image).double())
    assert len(expected) == 149 + 19 + 1
    for name, reference in expected.items():
        value = values.get(f"{name}.relu", values.get(name))
        assert value is not None, name
        error = np.abs(value - reference).max() / np.abs(reference).max()
        # Against float64: rounding adds up on the way through the layers.
        assert error < 4e-6, (name, error)


def pytorch_values(state_dict: Arrays, image: Any) -> Arrays:
    """The output of every unit and block, and the logits, of the PyTorch module."""
    import torch

    module = pytorch_inception_v4()
    tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    module.double().eval()
    values: Arrays = {}

    def record(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            values[name] = output.numpy()

        return hook

    for name, child in module.named_modules():
        is_block = name.startswith("features.") and name.count(".") == 1
        if hasattr(child, "bn") or is_block:
            child.register_forward_hook(record(name))
    with torch.no_grad():
        values["logits"] = module(image).numpy()
    return values


def pytorch_inception_v4() -> Any:
    """Inception V4 in PyTorch, with timm's module names, written out from the paper's figures."""
    import torch
    from torch import nn

    def unit(c_in: int, c_out: int, h: int, w: int, stride: int = 1, pad: bool = True) -> Any:
        padding = (h // 2, w // 2) if pad else 0
        layers = {
            "conv": nn.Conv2d(c_in, c_out, (h, w), stride, padding, bias=False),
            "bn": nn.BatchNorm2d(c_out, eps=1e-3),
            "relu": nn.ReLU(),
        }
        return nn.Sequential(OrderedDict(layers))

    def max_pool() -> Any:
        return nn.MaxPool2d(3, 2)

    def average_pool() -> Any:
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    class Concat(nn.Module):
        def __init__(self, **branches: Any) -> None:
            super().__init__()
            for name, branch in branches.items():
                self.add_module(name, branch)

        def forward(self, x: Any) -> Any:
            return torch.cat([branch(x) for branch in self.children()], 1)

    class InceptionC(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch0 = unit(1536, 256, 1, 1)
            self.branch1_0 = unit(1536, 384, 1, 1)
            self.branch1_1a = unit(384, 256, 1, 3)
            self.branch1_1b = unit(384, 256, 3, 1)
            self.branch2_0 = unit(1536, 384, 1, 1)
            self.branch2_1 = unit(384, 448, 3, 1)
            self.branch2_2 = unit(448, 512, 1, 3)
            self.branch2_3a = unit(512, 256, 1, 3)
            self.branch2_3b = unit(512, 256, 3, 1)
            self.branch3 = nn.Sequential(average_pool(), unit(1536, 256, 1, 1))

        def forward(self, x: Any) -> Any:
            one = self.branch1_0(x)
            two = self.branch2_2(self.branch2_1(self.branch2_0(x)))
            forks = [self.branch1_1a(one), self.branch1_1b(one)]
            forks += [self.branch2_3a(two), self.branch2_3b(two)]
            return torch.cat([self.branch0(x), *forks, self.branch3(x)], 1)

    def inception_a() -> Any:
        return Concat(
            branch0=unit(384, 96, 1, 1),
            branch1=nn.Sequential(unit(384, 64, 1, 1), unit(64, 96, 3, 3)),
            branch2=nn.Sequential(unit(384, 64, 1, 1), unit(64, 96, 3, 3), unit(96, 96, 3, 3)),
            branch3=nn.Sequential(average_pool(), unit(384, 96, 1, 1)),
        )

    def inception_b() -> Any:
        return Concat(
            branch0=unit(1024, 384, 1, 1),
            branch1=nn.Sequential(
                unit(1024, 192, 1, 1), unit(192, 224, 1, 7), unit(224, 256, 7, 1)
            ),
            branch2=nn.Sequential(
                unit(1024, 192, 1, 1),
                unit(192, 192, 7, 1),
                unit(192, 224, 1, 7),
                unit(224, 224, 7, 1),
                unit(224, 256, 1, 7),
            ),
            branch3=nn.Sequential(average_pool(), unit(1024, 128, 1, 1)),
        )

    mixed_4a = Concat(
        branch0=nn.Sequential(unit(160, 64, 1, 1), unit(64, 96, 3, 3, pad=False)),
        branch1=nn.Sequential(
            unit(160, 64, 1, 1),
            unit(64, 64, 1, 7),
            unit(64, 64, 7, 1),
            unit(64, 96, 3, 3, pad=False),
        ),
    )
    reduction_a = Concat(
        branch0=unit(384, 384, 3, 3, 2, pad=False),
        branch1=nn.Sequential(
            unit(384, 192, 1, 1), unit(192, 224, 3, 3), unit(224, 256, 3, 3, 2, pad=False)
        ),
        branch2=max_pool(),
    )
    reduction_b = Concat(
        branch0=nn.Sequential(unit(1024, 192, 1, 1), unit(192, 192, 3, 3, 2, pad=False)),
        branch1=nn.Sequential(
            unit(1024, 256, 1, 1),
            unit(256, 256, 1, 7),
            unit(256, 320, 7, 1),
            unit(320, 320, 3, 3, 2, pad=False),
        ),
        branch2=max_pool(),
    )
    features = nn.Sequential(
        unit(3, 32, 3, 3, 2, pad=False),
        unit(32, 32, 3, 3, pad=False),
        unit(32, 64, 3, 3),
        Concat(maxpool=max_pool(), conv=unit(64, 96, 3, 3, 2, pad=False)),
        mixed_4a,
        Concat(conv=unit(192, 192, 3, 3, 2, pad=False), maxpool=max_pool()),
        *(inception_a() for _ in range(4)),
        reduction_a,
        *(inception_b() for _ in range(7)),
        reduction_b,
        *(InceptionC() for _ in range(3)),
    )
    layers = {
        "features": features,
        "global_pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "last_linear": nn.Linear(1536, 1000),
    }
    return nn.Sequential(OrderedDict(layers))


def assert_calibrated(values: Arrays) -> None:
    for name, z in values.items():
        if name.endswith(".conv"):
            assert z.var() == pytest.approx(1, abs=1e-4), name
            assert 0.4 < (z > 0).mean() < 0.6, name
    assert values["logits"].mean() == pytest.approx(0, abs=1e-4)
    assert values["logits"].std() == pytest.approx(1, abs=1e-4)


def test_random_weights_are_calibrated_on_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images = inception_v4.calibration_images()[:, :, ::4, ::4]
    monkeypatch.setattr(inception_v4, "calibration_images", lambda: images)
    state_dict = inception_v4.random_state_dict(0)
    inception_v4.check_state_dict(state_dict)
    model = inception_v4.build_model(state_dict, image_size=images.shape[-1])
    assert_calibrated(run_all(model, images))


@pytest.mark.slow
def test_random_weights_suit_photographs() -> None:
    from skimage import data
    from skimage.transform import resize

    model = inception_v4.build_model(inception_v4.random_state_dict(0))
    assert_calibrated(run_all(model, inception_v4.calibration_images()))
    cat = resize(data.chelsea(), (299, 299)).transpose(2, 0, 1)[None] * 2 - 1
    for name, value in run_all(model, cat.astype(np.float32)).items():
        if name.endswith(".conv"):
            assert 0.1 < value.std() < 10, name


@pytest.mark.slow
def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (inception_v4.random_state_dict(seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    name = "features.0.conv.weight"
    assert not np.array_equal(first[name], other[name])
