"""Networks and weights files: against the public definitions, a loop in float64, and files made to be wrong."""

import hashlib
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lce_dist.errors import CheckpointError, ConfigError, RunError
from lce_dist.models.catalog import NET_NAMES, build_net, net_name, num_parameters
from lce_dist.models.iresnet import IRESNET_BLOCKS, IResNet
from lce_dist.models.mobilefacenet import MobileFaceNet
from lce_dist.models.old_model import freeze_net, model_kind
from lce_dist.models.preprocess import OUR_INPUT
from lce_dist.models.weights import fingerprint, load_weights, save_weights

TINY = tuple(name for name in NET_NAMES if name.startswith("tiny"))


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


# Taken from the public definitions at embedding size 512, 112 pixels (deepinsight/insightface at
# 7fadd420c2351d0ffa8cac403421c1a3ed733365, recognition/arcface_torch/backbones): how many tensors a state
# dict has, how many numbers its parameters hold, and a hash over the sorted lines "name shape".
PUBLIC = {
    "iresnet18": (187, 24_025_600, "6bdb508fbe8f9172"),
    "iresnet34": (331, 34_139_328, "88f842de492690dd"),
    "iresnet50": (475, 43_590_848, "d80a68220d7280f1"),
    "iresnet100": (925, 65_156_160, "dc48aa67c7449a7c"),
    "iresnet200": (1807, 118_833_920, "be360d6469b1859b"),
    "mobilefacenet": (333, 2_059_520, "a5470f4e8d3847b1"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_tensors_are_those_of_the_public_net(name):
    with torch.device("meta"):  # shapes without numbers
        net = IResNet(IRESNET_BLOCKS[name], 512, 112) if name in IRESNET_BLOCKS else MobileFaceNet(512, 112)
    state = net.state_dict()
    lines = sorted(f"{key} {tuple(tensor.shape)}" for key, tensor in state.items())
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    learned = sum(tensor.numel() for key, tensor in state.items() if not key.endswith(statistics))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    assert (len(state), learned, digest) == PUBLIC[name]


def test_iresnet50_by_name():
    with torch.device("meta"):
        net = IResNet(IRESNET_BLOCKS["iresnet50"], 512, 112)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["layer1.0.downsample.0.weight"] == (64, 64, 1, 1)
    assert shapes["layer3.13.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["layer4.0.conv1.weight"] == (512, 256, 3, 3)
    assert shapes["layer4.2.prelu.weight"] == (512,)
    assert shapes["fc.weight"] == (512, 512 * 7 * 7)
    assert shapes["features.weight"] == shapes["features.running_var"] == (512,)
    assert "layer1.1.downsample.0.weight" not in shapes
    assert "features.weight" not in dict(net.named_parameters())  # stays 1: no optimizer sees it
    assert num_parameters(net) == 43_590_848 - 512


def randomise(net):
    """Weights and batch statistics under which no term of the forward pass is trivial."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        else:
            low = -0.3 if name.endswith(("bias", "running_mean")) else 0.3
            tensor.uniform_(low, 1.3, generator=generator)
    return net.eval()


def loop_iresnet(state, images, stages):
    """The public forward pass in eval mode, written from tensor names alone."""

    def norm(x, name):
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)

    def prelu(x, name):
        return torch.where(x > 0, x, x * state[f"{name}.weight"].view(1, -1, 1, 1))

    x = prelu(norm(F.conv2d(images, state["conv1.weight"], padding=1), "bn1"), "prelu")
    for stage, num_blocks in enumerate(stages, 1):
        for number in range(num_blocks):
            block, stride = f"layer{stage}.{number}", 2 if number == 0 else 1
            y = F.conv2d(norm(x, f"{block}.bn1"), state[f"{block}.conv1.weight"], padding=1)
            y = prelu(norm(y, f"{block}.bn2"), f"{block}.prelu")
            y = norm(F.conv2d(y, state[f"{block}.conv2.weight"], stride=stride, padding=1), f"{block}.bn3")
            if stride == 2:
                x = norm(F.conv2d(x, state[f"{block}.downsample.0.weight"], stride=2), f"{block}.downsample.1")
            x = x + y
    flat = norm(x, "bn2").flatten(1)
    return norm(flat @ state["fc.weight"].T + state["fc.bias"], "features")


def test_iresnet_computes_the_public_forward_pass():
    net = randomise(build_net("iresnet18", 24, 32, seed=0)).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        truth = loop_iresnet(net.state_dict(), images, (2, 2, 2, 2))
        torch.testing.assert_close(net(images), truth, rtol=1e-10, atol=1e-10)
        net.features.weight.mul_(1.5)  # the stored scale of a public checkpoint takes part
        assert not torch.allclose(net(images), truth)


@pytest.mark.parametrize(
    ("name", "image_size"),
    [("iresnet18", 112), ("iresnet18", 48), ("mobilefacenet", 112), ("mobilefacenet", 64)]
    + [(name, size) for name in TINY for size in (32, 48, 64)],
)
def test_output_is_rows_of_embedding_dim_in_the_dtype_of_the_weights(name, image_size):
    net = build_net(name, 96, image_size, seed=1).eval()
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        full = net(images)
        half = net.bfloat16()(images)
    assert full.shape == half.shape == (2, 96)
    assert full.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert F.cosine_similarity(full, half.float()).min() > 0.99


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "tiny16", "tiny16-gn"])
def test_every_parameter_learns_also_under_autocast(name):
    net = build_net(name, 32, 32, seed=1).train()
    with torch.autocast("cpu", torch.bfloat16):
        embedding = net(torch.randn(4, 3, 32, 32))
    (embedding.float() * torch.randn(4, 32)).sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", ["tiny8", "tiny16-gn"])
def test_embedding_of_a_batch_has_norm_root_d(name):
    net = build_net(name, 64, 48, seed=1).train()
    norms = net(torch.randn(256, 3, 48, 48)).norm(dim=1)
    assert norms.mean().item() == pytest.approx(8.0, rel=0.03)


@pytest.mark.parametrize("name", ["tiny8", "tiny16", "tiny24", "tiny8-gn"])
def test_tiny_gradients_are_those_of_float64(name):
    # channels_last kernels for few channels have been wrong before (uxlfoundation/oneDNN issue 6035)
    net, exact = build_net(name, 32, 48, seed=2).train(), build_net(name, 32, 48, seed=2).double().train()
    images, wanted = torch.randn(17, 3, 48, 48), torch.randn(17, 32)
    (net(images) * wanted).sum().backward()
    (exact(images) * wanted).sum().backward()
    # relative to the largest: the last biases have no gradient, because the final norm takes their effect away
    largest = max(parameter.grad.norm() for parameter in exact.parameters())
    for (key, one), other in zip(net.named_parameters(), exact.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-3 * other.grad.norm() + 1e-6 * largest, key


def rows_and_gradient(net, images, seen):
    """Vectors of the first rows and the gradient they alone send back, among ``seen`` images."""
    embedding = net(images[:seen])[:3]
    torch.manual_seed(5)
    loss = (embedding * torch.randn(embedding.shape)).sum()
    return embedding, torch.autograd.grad(loss, list(net.parameters()))


@pytest.mark.parametrize("name", ["tiny8-gn", "tiny16-gn"])
def test_group_norm_net_sees_each_image_alone(name):
    net = build_net(name, 32, 48, seed=2).train()
    assert not list(net.buffers())
    images = torch.randn(17, 3, 48, 48)
    alone, among = (rows_and_gradient(net, images, seen) for seen in (3, 17))
    torch.testing.assert_close(alone[0], among[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(alone[1], among[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_batch_norm_net_does_not():
    net = build_net("tiny8", 32, 48, seed=2).train()
    images = torch.randn(17, 3, 48, 48)
    assert (net(images[:3]) - net(images)[:3]).abs().max() > 0.1


def test_group_norm_twin_has_no_batch_norm_and_the_same_convolutions():
    batch, group = (build_net(name, 32, 48, seed=3) for name in ("tiny24", "tiny24-gn"))
    kinds = {type(module).__name__ for module in group.modules()}
    assert "GroupNorm" in kinds and not any(kind.startswith("BatchNorm") for kind in kinds)
    for key, weight in group.named_parameters():
        assert torch.equal(weight, batch.state_dict()[key])


def test_tiny_trains_on_a_task_that_needs_more_than_colour():
    # two classes that differ by the side of the bright half alone
    torch.manual_seed(0)
    net = build_net("tiny8", 2, 32, seed=0).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(12):
        labels = torch.randint(2, (32,))
        images = torch.randn(32, 3, 32, 32)
        for row, label in enumerate(labels):
            images[row, :, :, 16 * label : 16 * label + 16] += 1.0
        loss = F.cross_entropy(4 * net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "tiny16", "tiny16-gn"])
def test_initial_weights_depend_on_the_arguments_alone(name):
    torch.manual_seed(11)
    first = build_net(name, 16, 32, seed=5)
    torch.manual_seed(12)
    torch.rand(1000)
    before = torch.get_rng_state()
    second = build_net(name, 16, 32, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(build_net(name, 16, 32, seed=6))


def test_a_net_that_fails_to_build_also_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        build_net("tiny16", -1, 32, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("iresnet5", 512, 112), "net 'iresnet5' is unknown; did you mean 'iresnet50'?"),
        (("tiny16_gn", 512, 112), "net 'tiny16_gn' is unknown; did you mean 'tiny16-gn'?"),
        (("iresnet50", 512, 120), "image_size is 120; must be a multiple of 16"),
        (("tiny16", 512, 50), "Use 48"),
        (("mobilefacenet", 512, 8), "Use 16"),
    ],
)
def test_names_and_sizes_that_do_not_exist(arguments, message):
    with pytest.raises(ConfigError) as caught:
        build_net(*arguments, seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_arcface_torch_are_names_of_ours():
    assert [net_name(name) for name in ("r18", "r50", "r100", "iresnet18")] == [
        "iresnet18",
        "iresnet50",
        "iresnet100",
        "iresnet18",
    ]
    one, other = (build_net(name, 8, 32, seed=1) for name in ("r18", "iresnet18"))
    assert fingerprint(one) == fingerprint(other)
    spaces = {freeze_net(one, name, 8, OUR_INPUT).fingerprint for name in ("r18", "iresnet18")}
    assert len(spaces) == 1


def test_unknown_name_without_a_neighbour_lists_all():
    with pytest.raises(ConfigError, match=r"known: iresnet18, .*, tiny32-gn"):
        build_net("vgg", 512, 112, seed=0)


@pytest.mark.parametrize("name", ["tiny16", "tiny8-gn", "mobilefacenet"])
def test_weights_come_back_to_the_bit(tmp_path, name):
    net = build_net(name, 32, 48, seed=4).train()
    net(torch.randn(8, 3, 48, 48))  # batch statistics that are not the initial ones
    path = tmp_path / "run" / "model.safetensors"
    save_weights(net, path, {"net": name, "stage": "new"})
    other = build_net(name, 32, 48, seed=9)
    assert fingerprint(other) != fingerprint(net)
    load_weights(other, path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    assert fingerprint(other) == fingerprint(net)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"net": name, "stage": "new"}
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_saved_floats_are_float32_and_contiguous_views_of_one_buffer_are_fine(tmp_path):
    net = build_net("tiny8", 32, 48, seed=4).to(memory_format=torch.channels_last)
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()]).bfloat16()
    offset = 0
    for parameter in net.parameters():  # as ZeRO leaves them: 16 bits, all in one buffer
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    save_weights(net, tmp_path / "a.safetensors", {})
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert torch.equal(tensor, net.state_dict()[name].to(tensor.dtype))


def test_an_old_file_stays_whole_when_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "model.safetensors"
    net = build_net("tiny8", 32, 48, seed=4)
    save_weights(net, path, {})
    before = path.read_bytes()
    (tmp_path / f"model.safetensors.{os.getpid()}.partial").mkdir()  # something stands in the way
    with pytest.raises(RunError, match=r"weights .*model\.safetensors cannot be written"):
        save_weights(build_net("tiny8", 32, 48, seed=5), path, {})
    assert path.read_bytes() == before


def test_fingerprint_ignores_order_and_layout_and_sees_everything_else():
    net = build_net("tiny8", 32, 48, seed=4)
    first = fingerprint(net)
    assert len(first) == 16 and int(first, 16) >= 0
    assert fingerprint(build_net("tiny8", 32, 48, seed=4).to(memory_format=torch.channels_last)) == first
    reordered = build_net("tiny8", 32, 48, seed=4)
    reordered._modules = dict(reversed(reordered._modules.items()))
    assert fingerprint(reordered) == first
    one_bit = build_net("tiny8", 32, 48, seed=4)
    with torch.no_grad():
        one_bit.fc.weight.view(torch.int32)[3, 3] ^= 1
    buffer = build_net("tiny8", 32, 48, seed=4)
    buffer.features.num_batches_tracked += 1
    half = build_net("tiny8", 32, 48, seed=4).bfloat16()
    assert len({first, *(fingerprint(n) for n in (one_bit, buffer, half))}) == 4


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ""])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"lr": 0.1}},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    ],
)
def test_torch_state_dicts_load(tmp_path, suffix, wrap):
    net, other = (build_net("tiny8", 32, 48, seed) for seed in (1, 2))
    path = tmp_path / f"net{suffix}"
    torch.save(wrap(net.state_dict()), path)
    load_weights(other, path)
    assert fingerprint(other) == fingerprint(net)


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_a_header_whose_length_reads_as_another_kind_is_still_safetensors(tmp_path, start):
    net, other = (build_net("tiny8", 32, 48, seed) for seed in (1, 2))
    path = tmp_path / "net.safetensors"
    save_file(net.state_dict(), path, metadata={"about": "x"})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    missing = (int.from_bytes(start, "little") - length) % 256 ** len(start)
    save_file(net.state_dict(), path, metadata={"about": "x" * (1 + missing)})
    assert path.read_bytes().startswith(start)
    load_weights(other, path)
    assert fingerprint(other) == fingerprint(net)
    assert model_kind(path) == "tensors"


class Burglar:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("suffix", ["pt", "ckpt", "bin", "safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, zipped, suffix):
    path, trace = tmp_path / f"evil.{suffix}", tmp_path / "was_here"
    net = build_net("tiny8", 32, 48, seed=1)
    before = fingerprint(net)
    torch.save({"state_dict": net.state_dict(), "hook": Burglar(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil\.\w+ holds code \(\w+\.mkdir\).*refused.*state_dict"):
        load_weights(net, path)
    assert not trace.exists()
    assert fingerprint(net) == before
    with path.open("rb") as file:
        torch.load(file, weights_only=False)  # our own file: it would have run
    assert trace.exists()


def broken_files(tmp_path):
    """(file, what the message says) of files that are no weights."""
    state = build_net("tiny8", 32, 48, seed=1).state_dict()
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    torch.save(state, tmp_path / "whole.pt")
    cases = {
        "cut.safetensors": (whole.read_bytes()[:-9], "damaged"),
        "cut.pt": ((tmp_path / "whole.pt").read_bytes()[:-999], "damaged"),
        "empty.safetensors": (b"", "damaged"),
        "empty.pt": (b"", "damaged"),
        "page.pth": (b"<!DOCTYPE html><html>not found</html>", "damaged"),
        "list.pt": (None, "holds a list"),
        "number.pt": (None, "'epoch' is a int; must be a tensor"),
        "plain.pt": (pickle.dumps({"a": 1}, protocol=2), "damaged"),
        "model.onnx": (b"x", "neither safetensors nor a torch state dict"),
    }
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({**state, "epoch": 3}, tmp_path / "number.pt")
    for name, (content, _) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    return [(tmp_path / name, message) for name, (_, message) in cases.items()] + [
        (tmp_path / "absent.pt", "is not a file"),
        (tmp_path, "is not a file"),
    ]


def test_files_that_are_no_weights(tmp_path):
    net = build_net("tiny8", 32, 48, seed=2)
    before = fingerprint(net)
    for path, message in broken_files(tmp_path):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_weights(net, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert fingerprint(net) == before


def test_files_that_do_not_fit_name_the_first_tensor_and_change_nothing(tmp_path):
    state = build_net("tiny8", 32, 48, seed=1).state_dict()
    first, second = list(state)[:2]
    without = {name: tensor for name, tensor in state.items() if name not in (first, second)}
    wrong = {**state, "fc.weight": torch.zeros(32, 64 * 4)}
    cases = {
        "missing": (without, f"lacks {first!r} (and 1 more); must hold exactly the {len(state)} tensors"),
        "extra": ({**state, "head.rows": torch.zeros(2)}, "has an unexpected 'head.rows'; must hold"),
        "both": ({**without, "x": torch.zeros(2)}, f"lacks {first!r} (and 1 more) and has an unexpected 'x'; must"),
        "shape": (wrong, "'fc.weight' has shape (32, 256); this net needs (32, 576). Set net, embedding_dim"),
    }
    net = build_net("tiny8", 32, 48, seed=2)
    before = fingerprint(net)
    for name, (tensors, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        with pytest.raises(CheckpointError) as caught:
            load_weights(net, path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert fingerprint(net) == before
