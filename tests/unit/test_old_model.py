"""Old models and stored vectors: every kind of file made here, against the network itself, and files made to do harm."""

import io
import json
import os
import pickle
import re
import warnings
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from lce_dist.errors import CheckpointError, ConfigError, DataError, LceError
from lce_dist.models import stored_vectors
from lce_dist.models.agreement import check_against_stored
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import FrozenModel, ModelFile, freeze_net, model_kind, open_model
from lce_dist.models.preprocess import OUR_INPUT, InputSpec, prepare_images
from lce_dist.models.stored_vectors import StoredVectors
from lce_dist.models.weights import load_weights, save_weights
from lce_dist.vector_files import open_vectors

try:
    import onnx
    import onnxruntime  # noqa: F401
except ImportError:
    onnx = None
needs_onnx = pytest.mark.skipif(onnx is None, reason="onnx or onnxruntime is not installed (pip install -e '.[onnx]')")
CPU = torch.device("cpu")
NET, DIM, SIZE = "tiny8", 24, 48


def trained_net(name=NET, dim=DIM, size=SIZE):
    """Weights and batch statistics under which no part of the forward pass is trivial."""
    net = build_net(name, dim, size, seed=1)
    generator = torch.Generator().manual_seed(3)
    for key, tensor in net.state_dict().items():
        if key.endswith(("running_mean", "bias")):
            tensor.normal_(0.0, 0.2, generator=generator)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
    return net.eval()


def some_images(count=5, size=SIZE, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def onnx_file(net, path, rows=None, size=SIZE, opset=17):
    axes = {"data": {0: "b"}, "out": {0: "b"}} if rows is None else None
    torch.onnx.export(
        net,
        (torch.zeros(rows or 1, 3, size, size),),
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=["data"],
        output_names=["out"],
        dynamic_axes=axes,
    )


def traced(net, path, rows=1, size=SIZE):
    torch.jit.trace(net, torch.zeros(rows, 3, size, size)).save(str(path))


def exported(net, path, dynamic=True, rows=2, size=SIZE):
    shapes = ({0: torch.export.Dim("b")},) if dynamic else None
    program = torch.export.export(net, (torch.zeros(rows, 3, size, size),), dynamic_shapes=shapes)
    torch.export.save(program, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One network in every kind of file, under names that say nothing."""
    root, net = tmp_path_factory.mktemp("files"), trained_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced(net, root / "traced.bin")
        torch.jit.script(net).save(str(root / "scripted.bin"))
        exported(net, root / "exported.bin")
        exported(net, root / "exported_one.bin", dynamic=False, rows=1)
        exported(net, root / "exported_three.bin", dynamic=False, rows=3)
        if onnx is not None:
            onnx_file(net, root / "onnx.bin")
            onnx_file(net, root / "onnx_one.bin", rows=1)
    torch.save(net.state_dict(), root / "state.pt")
    torch.save(net.state_dict(), root / "legacy.pth", _use_new_zipfile_serialization=False)
    save_weights(net, root / "ours.safetensors", {})
    return root


@pytest.fixture(autouse=True)
def _no_warnings_of_torchscript():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


TENSORS = ("state.pt", "legacy.pth", "ours.safetensors")
PROGRAMS = ("traced.bin", "scripted.bin", "exported.bin", "exported_one.bin", "exported_three.bin")
ONNX = tuple(pytest.param(name, marks=needs_onnx) for name in ("onnx.bin", "onnx_one.bin"))


def open_named(files, name, **changes):
    built = {"net": NET, "embedding_dim": DIM} if name in TENSORS else {}
    return open_model(ModelFile(files / name, **built, **changes), SIZE, CPU)


@pytest.mark.parametrize("name", (*TENSORS, *PROGRAMS, *ONNX))
def test_every_kind_gives_the_vectors_of_the_network(files, name):
    model = open_named(files, name)
    images = some_images(5)
    with torch.no_grad():
        truth = trained_net()(images)
    found = model(images)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    assert found.shape == (5, DIM) and found.dtype == torch.float32 and not found.requires_grad
    assert model.embedding_dim == DIM and re.fullmatch(r"[0-9a-f]{16}", model.fingerprint)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert not model.training and not any(module.training for module in model.modules())
    torch.testing.assert_close(model(images[:1]), truth[:1], rtol=1e-4, atol=1e-5)
    assert model(images[:0]).shape == (0, DIM)


def test_kinds_are_told_by_content(files):
    kinds = {"traced.bin": "torchscript", "exported.bin": "exported", "legacy.pth": "tensors"}
    assert {name: model_kind(files / name) for name in kinds} == kinds


def test_fingerprints_cover_weights_net_and_preprocessing_and_not_the_container(files, tmp_path):
    first = open_named(files, "state.pt").fingerprint
    assert {open_named(files, name).fingerprint for name in TENSORS} == {first}
    assert freeze_net(trained_net(), NET, DIM, OUR_INPUT).fingerprint == first
    specs = [InputSpec(channels="bgr"), InputSpec(flip_average=True), InputSpec(mean=(127.5, 127.5, 127.0))]
    specs += [InputSpec(std=(128.0, 128.0, 128.0)), InputSpec(size=32)]
    changed = {freeze_net(trained_net(), NET, DIM, spec).fingerprint for spec in specs}
    other = trained_net()
    with torch.no_grad():
        other.fc.weight[0, 0] += 1e-3
    changed |= {freeze_net(other, NET, DIM, OUR_INPUT).fingerprint}
    changed |= {freeze_net(trained_net(), "tiny16", DIM, OUR_INPUT).fingerprint}
    assert len(changed - {first}) == 7
    programs = {name: open_named(files, name).fingerprint for name in PROGRAMS}
    assert len({first, *programs.values()}) == 1 + len(PROGRAMS)
    (tmp_path / "copy").write_bytes((files / "exported.bin").read_bytes())
    assert open_named(tmp_path, "copy").fingerprint == programs["exported.bin"]
    assert open_named(files, "exported.bin", input=specs[0]).fingerprint != programs["exported.bin"]


# --- networks that exporters write in other ways -----------------------------------------------------------------


class Attention(nn.Module):
    """Patches, attention, layer norm, a split and sizes taken at run time: what a vision transformer exports."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.places = nn.Parameter(torch.randn(1, 36, 16) * 0.1)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.last = nn.Linear(16, DIM)
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        rows = tokens.shape[0]
        q, k, v = self.qkv(self.norm(tokens)).view(rows, 36, 2, 24).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, 36 * 16)
        drawn = torch.zeros(rows, 1, device=images.device) + mixed.view(rows, 36, 16).mean(1)
        return self.last(F.gelu(drawn)) * self.scale


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_transformer_and_its_core_form(tmp_path, dynamic):
    net, images = Attention().eval(), some_images(4)
    exported(net, tmp_path / "a.pt2", dynamic)
    program = torch.export.load(tmp_path / "a.pt2")  # our own file: the library is the oracle
    torch.export.save(program.run_decompositions(), tmp_path / "core.pt2")
    with torch.no_grad():
        truth = net(images)
    for name in ("a.pt2", "core.pt2"):
        torch.testing.assert_close(open_named(tmp_path, name)(images), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilefacenet", "iresnet18"])
def test_exported_face_nets(tmp_path, name):
    net, images = trained_net(name, 16, 32), some_images(2, 32)
    exported(net, tmp_path / "a.pt2", size=32)
    traced(net, tmp_path / "a.pt", size=32)
    with torch.no_grad():
        truth = net(images)
    for file in ("a.pt2", "a.pt"):
        model = open_model(ModelFile(tmp_path / file), 32, CPU)
        torch.testing.assert_close(model(images), truth, rtol=1e-4, atol=1e-4)


class HalfNet(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net.half()

    def forward(self, images):
        return self.net(images)


class FoldedBatch(nn.Module):
    """A trace of this holds the number of images as a constant."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images).reshape(int(images.shape[0]), DIM)


class BatchStatistics(FoldedBatch):
    def forward(self, images):
        return self.net(images - images.mean((0, 2, 3), keepdim=True))


@pytest.mark.parametrize("wrapper", [FoldedBatch, BatchStatistics])
def test_a_program_whose_images_share_a_batch_sees_them_one_at_a_time(tmp_path, wrapper):
    net, images = wrapper(trained_net()).eval(), some_images(4)
    traced(net, tmp_path / "a.pt")
    with torch.no_grad():
        truth = torch.cat([net(image[None]) for image in images])
    model = open_named(tmp_path, "a.pt")
    torch.testing.assert_close(model(images), truth, rtol=1e-4, atol=1e-5)


@needs_onnx
def test_onnx_in_half_precision_and_with_weights_beside_it(tmp_path, files):
    images = some_images(4)
    with torch.no_grad():
        truth = trained_net()(images)
    half = onnx.load(files / "onnx.bin")
    onnx_file(HalfNet(trained_net()), tmp_path / "plain.onnx")  # takes floats, computes in halves
    casting = open_named(tmp_path, "plain.onnx")
    assert F.cosine_similarity(casting(images), truth).min() > 0.999
    graph = onnx.load(tmp_path / "plain.onnx")
    cast = graph.graph.node[0]
    assert cast.op_type == "Cast"
    graph.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(graph, tmp_path / "half.onnx")
    assert F.cosine_similarity(open_named(tmp_path, "half.onnx")(images), truth).min() > 0.999

    onnx.save_model(half, tmp_path / "large.onnx", save_as_external_data=True, location="large.bin", size_threshold=0)
    model = open_named(tmp_path, "large.onnx")
    torch.testing.assert_close(model(images), truth, rtol=1e-4, atol=1e-5)
    weights = bytearray((tmp_path / "large.bin").read_bytes())
    weights[0] ^= 1
    (tmp_path / "large.bin").write_bytes(weights)
    assert open_named(tmp_path, "large.onnx").fingerprint != model.fingerprint


# --- public checkpoints ------------------------------------------------------------------------------------------


def test_arcface_torch_checkpoints(tmp_path):
    net, images = trained_net("iresnet18", 16, 32), some_images(2, 32)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    bare = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(images).sum().backward()
    optimizer.step()
    for name, tensor in net.state_dict().items():
        tensor.copy_(state[name])
    checkpoint = {
        "epoch": 3,
        "global_step": 700,
        "state_dict_backbone": state,
        "state_dict_softmax_fc": {"weight": torch.randn(10, 16)},
        "state_optimizer": optimizer.state_dict(),
        "state_lr_scheduler": {"base_lr": 0.1, "max_steps": 9, "_last_lr": [0.1, 0.1], "last_epoch": 3},
    }
    distributed = {f"module.{name}": tensor for name, tensor in bare.items()}
    cases = {"backbone.pth": state, "old.pth": bare, "ddp.pt": distributed, "checkpoint_gpu_0.pt": checkpoint}
    with torch.no_grad():
        truth = net.eval()(images)
    for name, value in cases.items():
        torch.save(value, tmp_path / name)
        model = open_model(ModelFile(tmp_path / name, "iresnet18", 16), 32, CPU)
        torch.testing.assert_close(model(images), truth, rtol=0, atol=0)
    del bare["layer1.0.bn1.running_mean"]
    torch.save(bare, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match=r"lacks 'layer1\.0\.bn1\.running_mean'; must hold"):
        load_weights(net, tmp_path / "lacking.pth")


# --- preprocessing -----------------------------------------------------------------------------------------------


def test_the_default_touches_nothing():
    images = some_images(2)
    assert prepare_images(images, OUR_INPUT) is images
    assert prepare_images(images, InputSpec(size=SIZE)) is images


def test_channels_mean_and_std_by_hand():
    # one pixel of 8 bits: R, G, B = 255, 51, 0 -> in [-1, 1]: 1, -0.6, -1
    images = torch.tensor([1.0, -0.6, -1.0]).view(1, 3, 1, 1)
    spec = InputSpec(channels="bgr", mean=(100.0, 50.0, 5.0), std=(10.0, 2.0, 50.0))
    found = prepare_images(images, spec).flatten().tolist()
    assert found == pytest.approx([(0 - 100) / 10, (51 - 50) / 2, (255 - 5) / 50], abs=1e-4)
    zero_to_one = InputSpec(mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    assert prepare_images(images, zero_to_one).flatten().tolist() == pytest.approx([1.0, 0.2, 0.0], abs=1e-6)


def test_resizing_is_that_of_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    for size in (28, 112):
        truth = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
        found = prepare_images(images, InputSpec(size=size))[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
        assert np.abs(found - truth).max() <= 1.01  # Pillow rounds to whole numbers, twice


def test_flip_average_is_the_mean_of_two_unit_vectors():
    net, images = trained_net(), some_images(3)
    with torch.no_grad():
        one, other = net(images).double(), net(torch.flip(images, [3])).double()
    truth = (one / one.norm(dim=1, keepdim=True) + other / other.norm(dim=1, keepdim=True)) / 2
    found = freeze_net(net, NET, DIM, InputSpec(flip_average=True))(images)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-6)
    assert (found - net(images)).abs().max() > 0.1


def test_a_model_of_another_size(files):
    model = open_model(ModelFile(files / "exported.bin", input=InputSpec(size=SIZE)), 64, CPU)
    images = some_images(2, 64)
    truth = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(model(images), trained_net()(truth), rtol=1e-4, atol=1e-5)
    for name in ("exported.bin", "traced.bin"):
        with pytest.raises(LceError, match=r"Set input\.size to"):
            open_model(ModelFile(files / name), 64, CPU)


# --- malice ------------------------------------------------------------------------------------------------------


class Burglar:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def refused(tmp_path, path, match, **built):
    """The file is refused in one line, and left no trace."""
    with pytest.raises(LceError, match=match) as caught:
        open_model(ModelFile(path, **built), SIZE, CPU)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert not (tmp_path / "was_here").exists()


def repacked(source, target, changes):
    """A copy of a zip with some members replaced or added; names without their first folder."""
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].partition("/")[0]
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {f"{root}/{name}": content for name, content in changes.items()}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def member(source, name):
    with zipfile.ZipFile(source) as archive:
        return archive.read(next(entry for entry in archive.namelist() if entry.endswith(name)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", ["state_dict", "state_dict_backbone"])
def test_code_in_a_state_dict(tmp_path, zipped, wrapper):
    evil = {wrapper: trained_net().state_dict(), "x": Burglar(tmp_path / "was_here")}
    torch.save(evil, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path, tmp_path / "a.pt", r"holds code \(\w+\.mkdir\)", net=NET, embedding_dim=DIM)
    torch.load(tmp_path / "a.pt", weights_only=False)  # our own file: it would have run
    assert (tmp_path / "was_here").exists()


def test_code_in_the_pickles_of_torchscript(tmp_path, files):
    for number, name in enumerate(("data.pkl", "constants.pkl")):
        for protocol in (2, 4):
            evil = pickle.dumps(Burglar(tmp_path / "was_here"), protocol=protocol)
            repacked(files / "traced.bin", tmp_path / f"{number}{protocol}.pt", {name: evil})
            refused(tmp_path, tmp_path / f"{number}{protocol}.pt", r"holds code \(\w+\.mkdir\)")


def test_torchscript_that_writes_files(tmp_path, files):
    class Writer(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            return self.net(images)

    module = torch.jit.script(Writer(trained_net()))
    module.define(
        f"""
        def write(self, images):
            torch.save(images, "{tmp_path}/was_here")
            return self.net(images)
        """
    )
    module.save(str(tmp_path / "writes.pt"))
    refused(tmp_path, tmp_path / "writes.pt", r"names 'save'; refused")
    torch.jit.load(str(tmp_path / "writes.pt")).write(some_images(1))  # our own file: it would have
    assert (tmp_path / "was_here").exists()
    (tmp_path / "was_here").unlink()

    name = "code/__torch__/lce_dist/models/tiny.py"
    code = member(files / "traced.bin", name)
    for number, line in enumerate(
        (
            b'torch . from_file("x", True, 9)',
            b"ops . c10d . barrier()",
            b"ops.\\\n  symm_mem.x()",
            b"rpc_sync(images)",
            b"x : __torch__.torch.classes.dist_c10d.Store",
        )
    ):
        changed = code.replace(
            b"    features = self.features\n", b"    " + line + b"\n    features = self.features\n", 1
        )
        assert changed != code
        repacked(files / "traced.bin", tmp_path / f"{number}.pt", {name: changed})
        refused(tmp_path, tmp_path / f"{number}.pt", "refused, because")


def changed_program(files, target, change, extra=None):
    program = json.loads(member(files / "exported.bin", "models/model.json"))
    change(program)
    repacked(files / "exported.bin", target, {"models/model.json": json.dumps(program).encode(), **(extra or {})})


def test_code_in_torch_export(tmp_path, files):
    evil = io.BytesIO()
    torch.save(Burglar(tmp_path / "was_here"), evil)
    source = files / "exported.bin"

    # 1: example inputs, which torch.export.load unpickles without restriction after the restricted try fails;
    # nothing here reads them, so the network is whole
    repacked(source, tmp_path / "sample.pt2", {"data/sample_inputs/model.pt": evil.getvalue()})
    model = open_named(tmp_path, "sample.pt2")
    torch.testing.assert_close(model(some_images(2)), open_named(files, "exported.bin")(some_images(2)))
    assert not (tmp_path / "was_here").exists()
    with pytest.raises((AssertionError, TypeError)):  # the second from torch's own log message, where it is shown
        torch.export.load(tmp_path / "sample.pt2")  # our own file: it runs
    assert (tmp_path / "was_here").exists()
    (tmp_path / "was_here").rmdir()

    # 2: a weight as a pickle, a constant as an object, the older form of both
    weights = json.loads(member(source, "model_weights_config.json"))
    weights["config"]["fc.weight"]["use_pickle"] = True
    path = weights["config"]["fc.weight"]["path_name"]
    changes = {"data/weights/model_weights_config.json": json.dumps(weights).encode()}
    repacked(source, tmp_path / "weight.pt2", {**changes, f"data/weights/{path}": evil.getvalue()})
    refused(tmp_path, tmp_path / "weight.pt2", "as a pickle or an object")
    for number, kind in enumerate(("custom_obj_0", "opaque_obj_0", "../weights/weight_0")):
        entry = {"path_name": kind, "is_param": False, "use_pickle": False, "tensor_meta": None}
        constants = json.dumps({"config": {"x": entry}}).encode()
        name = tmp_path / f"constant{number}.pt2"
        plain = pickle.dumps(Burglar(tmp_path / "was_here"))
        repacked(
            source, name, {"data/constants/model_constants_config.json": constants, f"data/constants/{kind}": plain}
        )
        refused(tmp_path, name, "as a pickle or an object")
    repacked(source, tmp_path / "older.pt2", {"data/weights/model.pt": evil.getvalue()})
    open_named(tmp_path, "older.pt2")  # torch.export.load would prefer the pickle; nothing here reads it
    assert not (tmp_path / "was_here").exists()

    # 3: a symbolic size, which sympy evaluates as Python
    text = f"__import__('os').mkdir('{tmp_path}/was_here')"

    def symbol(program):
        sizes = program["graph_module"]["graph"]["tensor_values"]["images"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = text

    changed_program(files, tmp_path / "symbol.pt2", symbol)
    open_named(tmp_path, "symbol.pt2")
    assert not (tmp_path / "was_here").exists()

    # 4: operators that reach files, Python functions by name, compiled libraries
    targets = ("torch.ops.aten.from_file.default", "os.mkdir", "torch.ops.c10d.barrier.default", "torch.load")
    targets += ("torch.ops.aten._nested_view_from_buffer.default", "torch.ops.aten.relu.no_such", "_operator.call")
    targets += ("torch.ops.aten.relu.__init__", "torch.ops.aten.relu.op", "torch.ops.aten.name.upper")
    for number, target in enumerate(targets):
        name = tmp_path / f"target{number}.pt2"
        changed_program(files, name, lambda p, t=target: p["graph_module"]["graph"]["nodes"][2].update(target=t))
        refused(tmp_path, name, re.escape(f"calls {target!r}; only aten operators"))
    repacked(source, tmp_path / "library.pt2", {"data/aotinductor/model/x.so": b"\x7fELF"})
    refused(tmp_path, tmp_path / "library.pt2", r"holds compiled code \(data/aotinductor/model/x\.so\)")

    with zipfile.ZipFile(tmp_path / "before28.pt2", "w") as archive:
        archive.writestr("version", "8.2")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", evil.getvalue())
    refused(tmp_path, tmp_path / "before28.pt2", "torch before 2.8, whose format can hold code")


@needs_onnx
@pytest.mark.parametrize(
    "place", ["../secret.bin", "/etc/passwd", "sub/x.bin", "*/_ORT_MEM_ADDR_/*", "..", "", "link.bin"]
)
def test_onnx_that_reads_other_files(tmp_path, files, place):
    (tmp_path / "m").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    (tmp_path / "m" / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(files / "onnx.bin")
    hidden = onnx.helper.make_tensor("hidden", onnx.TensorProto.FLOAT, [1], [0.0])
    hidden.ClearField("float_data")
    hidden.data_location = onnx.TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value=place)
    inside = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["c"], value=hidden)], "inside", [], [onnx.ValueInfoProto(name="c")]
    )
    node = onnx.helper.make_node("If", ["flag"], ["unused"], then_branch=inside, else_branch=inside)
    model.graph.node.append(node)
    path = tmp_path / "m" / "a.onnx"
    path.write_bytes(model.SerializeToString())
    refused(tmp_path, path, "wants weights from")


def test_objects_in_arrays(tmp_path):
    evil = np.array([[Burglar(tmp_path / "was_here")]], dtype=object)
    keys, vectors = np.array(["a"]), np.ones((1, 2), np.float32)
    np.save(tmp_path / "a.npy", evil, allow_pickle=True)
    (tmp_path / "a.keys.txt").write_text("a\n")
    np.savez(tmp_path / "v.npz", keys=keys, vectors=evil)
    np.savez(tmp_path / "k.npz", keys=evil[0], vectors=vectors)
    np.savez_compressed(tmp_path / "c.npz", keys=evil[0], vectors=evil)
    for name in ("a.npy", "v.npz", "k.npz", "c.npz"):
        with pytest.raises(DataError, match="objects") as caught:
            StoredVectors.open(tmp_path / name, tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "was_here").exists()
    np.load(tmp_path / "a.npy", allow_pickle=True)  # our own file: it would have run
    assert (tmp_path / "was_here").exists()


def test_code_in_the_schema_of_parquet(tmp_path):
    # Arrow once made a type of a Parquet file from a pickle beside it
    evil = pickle.dumps(Burglar(tmp_path / "was_here"))
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
    fields = [pa.field("key", pa.string()), pa.field("vector", pa.list_(pa.float32(), 2), metadata=extension)]
    table = pa.table([["a", "b"], pa.array([[1.0, 0.0], [0.0, 2.0]], pa.list_(pa.float32(), 2))], pa.schema(fields))
    pq.write_table(table, tmp_path / "a.parquet")
    stored = StoredVectors.open(tmp_path / "a.parquet", tmp_path / "cache")
    assert stored.rows(["b"]).tolist() == [[0.0, 1.0]]
    assert not (tmp_path / "was_here").exists()


# --- damage and misfits ------------------------------------------------------------------------------------------


def test_damaged_files(tmp_path, files):
    names = [*TENSORS, *PROGRAMS, *(["onnx.bin"] if onnx else [])]
    for name in names:
        whole = (files / name).read_bytes()
        built = {"net": NET, "embedding_dim": DIM} if name in TENSORS else {}
        for part, content in (("end", whole[: len(whole) // 2]), ("start", whole[64:]), ("nothing", b"")):
            path = tmp_path / f"{part}.{name}"
            path.write_bytes(content)
            refused(tmp_path, path, "damaged|no known kind|holds exactly|refuses", **built)
    (tmp_path / "page.onnx").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    refused(tmp_path, tmp_path / "page.onnx", "no known kind")
    refused(tmp_path, tmp_path / "absent.onnx", "is not a file")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a/b.jpg", b"x")
    refused(tmp_path, tmp_path / "photos.zip", "a zip of no known kind")


def test_graphs_that_lack_something(tmp_path, files):
    def broken(name, change, match):
        changed_program(files, tmp_path / name, change)
        refused(tmp_path, tmp_path / name, match)

    graph = ("graph_module", "graph")
    broken("version.pt2", lambda p: p["schema_version"].update(major=9), "has export schema 9; this release reads 8")
    broken("nodes.pt2", lambda p: p[graph[0]][graph[1]]["nodes"].pop(), "fails on images")
    broken("empty.pt2", lambda p: p.clear(), "damaged torch.export file")
    broken("kind.pt2", lambda p: p[graph[0]][graph[1]]["nodes"][2]["inputs"][0].update(arg={"as_graph": 1}), "as_graph")
    inputs = ("graph_module", "signature", "input_specs")
    rename = lambda p: p[inputs[0]][inputs[1]][inputs[2]][0]["parameter"].update(parameter_name="x")  # noqa: E731
    broken("weight.pt2", rename, "lacks the tensor 'x'")


class Shaped(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.net = trained_net()

    def forward(self, images):
        vectors = self.net(images)
        if self.kind == "maps":
            return vectors[:, :, None, None]
        if self.kind == "pair":
            return vectors, vectors
        if self.kind == "nan":
            return vectors / torch.zeros_like(vectors)
        if self.kind == "int":
            return vectors.long()
        return F.dropout(vectors, 0.5, training=True)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("maps", r"gives \(1, 24, 1, 1\) for images 1 x 3 x 48 x 48; must be one tensor \(1, D\)"),
        ("pair", r"must be one tensor|must take one image tensor"),
        ("nan", "not finite"),
        ("int", "not finite or no floats"),
        ("dropout", "exported in training mode"),
    ],
)
def test_outputs_that_are_no_vectors(tmp_path, kind, match):
    torch.jit.trace(Shaped(kind), torch.zeros(1, 3, SIZE, SIZE), check_trace=False).save(str(tmp_path / "a.pt"))
    refused(tmp_path, tmp_path / "a.pt", match)
    exported(Shaped(kind).eval(), tmp_path / "a.pt2")
    refused(tmp_path, tmp_path / "a.pt2", match)
    if onnx is not None and kind in ("maps", "pair", "nan"):
        onnx_file(Shaped(kind).eval(), tmp_path / "a.onnx", rows=1)
        refused(tmp_path, tmp_path / "a.onnx", match)


def test_exported_in_training_mode(tmp_path):
    program = torch.export.export(trained_net().train(), (torch.zeros(2, 3, SIZE, SIZE),))
    torch.export.save(program, tmp_path / "a.pt2")
    torch.export.save(program.run_decompositions(), tmp_path / "core.pt2")
    for name in ("a.pt2", "core.pt2"):
        refused(tmp_path, tmp_path / name, "was exported in training mode")


@needs_onnx
def test_onnx_inputs_that_do_not_fit(tmp_path, files):
    whole = onnx.load(files / "onnx_one.bin")
    pixels = onnx.ModelProto()
    pixels.CopyFrom(whole)
    pixels.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    pixels.graph.input[0].name = "pixels"
    pixels.graph.node.insert(0, onnx.helper.make_node("Cast", ["pixels"], ["data"], to=onnx.TensorProto.FLOAT))
    onnx.save(pixels, tmp_path / "uint8.onnx")
    refused(tmp_path, tmp_path / "uint8.onnx", r"takes tensor\(uint8\); must take floats")
    last = onnx.ModelProto()
    last.CopyFrom(whole)
    last.graph.input[0].name = "last"
    for place, side in enumerate((1, SIZE, SIZE, 3)):
        last.graph.input[0].type.tensor_type.shape.dim[place].dim_value = side
    last.graph.node.insert(0, onnx.helper.make_node("Transpose", ["last"], ["data"], perm=[0, 3, 1, 2]))
    onnx.save(last, tmp_path / "last.onnx")
    refused(tmp_path, tmp_path / "last.onnx", r"takes 1 x 48 x 48 x 3 .* Export it with channels first")
    with pytest.raises(
        ConfigError, match=r"takes images of 48 x 48 pixels; they would come with 64 x 64. Set input.size"
    ):
        open_model(ModelFile(files / "onnx.bin"), 64, CPU)
    whole.graph.node[0].domain = "com.example"
    onnx.save(whole, tmp_path / "foreign.onnx")
    refused(tmp_path, tmp_path / "foreign.onnx", "onnxruntime refuses")


def test_settings_that_do_not_fit_the_file(files):
    with pytest.raises(ConfigError, match=r"holds tensors without a network; set net and embedding_dim"):
        open_model(ModelFile(files / "state.pt"), SIZE, CPU)
    with pytest.raises(ConfigError, match=r"net is 'tiny8', and .* brings its own network. Remove net"):
        open_model(ModelFile(files / "traced.bin", net=NET), SIZE, CPU)
    with pytest.raises(ConfigError, match=r"embedding_dim is 512; .* gives 24. Set it to 24"):
        open_model(ModelFile(files / "traced.bin", embedding_dim=512), SIZE, CPU)
    with pytest.raises(CheckpointError, match="Set net to the network"):
        open_model(ModelFile(files / "state.pt", "tiny8-gn", DIM), SIZE, CPU)


# --- stored vectors ----------------------------------------------------------------------------------------------


def write(kind, path, keys, vectors):
    """Keys and vectors in one of the formats."""
    if kind == "npy":
        np.save(path, vectors)
        path.with_name(path.stem + ".keys.txt").write_bytes("".join(f"{key}\n" for key in keys).encode())
    elif kind == "npz":
        np.savez(path, keys=np.array(keys), vectors=vectors)
    elif kind == "npz-bytes":
        np.savez(path, keys=np.array([key.encode() for key in keys]), vectors=np.asfortranarray(vectors))
    elif kind == "npz-compressed":
        np.savez_compressed(path, keys=np.array(keys), vectors=vectors)
    else:
        flat = pa.array(vectors.reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        names = pa.array(keys, pa.string())
        if kind == "parquet-list":
            column = column.cast(pa.list_(flat.type))
            names = names.dictionary_encode()
        if kind == "parquet-large":
            column, names = column.cast(pa.large_list(flat.type)), names.cast(pa.large_string())
        pq.write_table(pa.table({"key": names, "vector": column}), path, row_group_size=64)


SUFFIX = {"npy": ".npy", "npz": ".npz", "npz-bytes": ".npz", "npz-compressed": ".npz"}
FORMATS = ("npy", "npz", "npz-bytes", "npz-compressed", "parquet", "parquet-list", "parquet-large")


def stored_as(kind, tmp_path, keys, vectors, name="v"):
    path = tmp_path / (name + SUFFIX.get(kind, ".parquet"))
    write(kind, path, keys, vectors)
    return StoredVectors.open(path, tmp_path / "cache")


def some_rows(count=300, dim=7, dtype=np.float32):
    rng = np.random.default_rng(5)
    keys = [f"{n:09d}.jpg" for n in rng.permutation(count)]
    keys[3] = "Zoë \u2028 人"  # text that some readers cut into lines
    return keys, (rng.normal(size=(count, dim)) * rng.uniform(0.1, 50, (count, 1))).astype(dtype)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_come_back_by_key_as_unit_vectors(tmp_path, kind, dtype):
    keys, vectors = some_rows(dtype=dtype)
    stored = stored_as(kind, tmp_path, keys, vectors)
    assert (stored.num_rows, stored.embedding_dim) == vectors.shape
    order = np.random.default_rng(1).permutation(len(keys))[:100].tolist()
    order += [3, 3]
    truth = np.stack(
        [vectors[row].astype(np.float64) / np.sqrt(sum(float(v) ** 2 for v in vectors[row])) for row in order]
    )
    found = stored.rows([keys[row] for row in order])
    assert found.dtype == np.float32 and found.shape == (102, 7)
    np.testing.assert_allclose(found, truth, atol=1e-6)
    assert stored.find([keys[row] for row in order]).tolist() == order
    assert stored.rows([]).shape == (0, 7)


def test_vectors_stay_on_disk_and_the_decoded_copy_is_made_once(tmp_path):
    keys, vectors = some_rows()
    for kind in FORMATS:
        stored = stored_as(kind, tmp_path, keys, vectors, kind)
        assert isinstance(stored._vectors, np.memmap), kind
    copies = sorted((tmp_path / "cache").iterdir())
    assert len(copies) == 5 and all(copy.suffix == ".npy" for copy in copies)  # npy and plain npz need none
    before = [copy.stat().st_mtime_ns for copy in copies]
    StoredVectors.open(tmp_path / "parquet.parquet", tmp_path / "cache")
    assert [copy.stat().st_mtime_ns for copy in sorted((tmp_path / "cache").iterdir())] == before


def test_one_fingerprint_for_one_content(tmp_path):
    keys, vectors = some_rows()
    first = {stored_as(kind, tmp_path, keys, vectors, f"a{kind}").fingerprint for kind in FORMATS}
    assert len(first) == 1 and re.fullmatch(r"[0-9a-f]{16}", next(iter(first)))
    changed = vectors.copy()
    changed[7, 2] = np.nextafter(changed[7, 2], np.float32(9))
    renamed = [*keys[:-1], "x.jpg"]
    swapped = [keys[1], keys[0], *keys[2:]]
    others = [(keys, changed), (renamed, vectors), (swapped, vectors), (keys[:-1], vectors[:-1])]
    found = {stored_as("npz", tmp_path, *other, "b").fingerprint for other in others}
    assert len(found | first) == 5


def test_hashes_that_collide_in_their_first_half_are_settled_by_the_second(tmp_path, monkeypatch):
    keys, vectors = some_rows(40)
    truth = stored_as("npz", tmp_path, keys, vectors).rows(keys[::-1])
    real = stored_vectors.hash_keys
    monkeypatch.setattr(stored_vectors, "hash_keys", lambda names: real(names) % np.array([3, 2**64 - 1], np.uint64))
    crowded = StoredVectors.open(tmp_path / "v.npz", tmp_path / "cache")
    assert crowded._longest_run >= 13
    np.testing.assert_array_equal(crowded.rows(keys[::-1]), truth)
    with pytest.raises(DataError, match=r"lack 1 of the 2 keys"):
        crowded.rows([keys[0], "absent"])


def test_missing_keys_are_counted_and_never_shown(tmp_path):
    keys, vectors = some_rows()
    stored = stored_as("npz", tmp_path, keys, vectors)
    with pytest.raises(
        DataError, match=r"\(300 rows\) lack 2 of the 4 keys asked for; the first is number 2"
    ) as caught:
        stored.rows([keys[0], "secret person", keys[1], "another"])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_vectors_without_a_direction_and_keys_that_stand_twice(tmp_path, kind):
    keys, vectors = some_rows()
    for number, value in enumerate((0.0, np.nan, np.inf)):
        bad = vectors.copy()
        bad[[4, 250]] = value
        with pytest.raises(DataError, match=r"row 5 is zero or not finite in float32; "):
            stored_as(kind, tmp_path, keys, bad, f"bad{number}")
        assert not [one for one in (tmp_path / "cache").glob("*") if "partial" in one.name]
    twice = [*keys[:-1], keys[8]]
    with pytest.raises(DataError, match=r"1 keys stand there again; the first in row 300\.") as caught:
        stored_as(kind, tmp_path, twice, vectors, "twice")
    assert keys[8] not in str(caught.value)
    with pytest.raises(DataError, match=r"the key or identity of row 6 is empty"):
        stored_as(kind, tmp_path, [*keys[:5], "", *keys[6:]], vectors, "empty")


def test_wrong_names_and_shapes_of_stored_vectors(tmp_path):
    keys, vectors = ["a", "b"], np.eye(2, 3, dtype=np.float32)
    lists = pa.array(vectors.tolist(), pa.list_(pa.float32()))

    def parquet(name, **columns):
        pq.write_table(pa.table(columns), tmp_path / name)

    np.save(tmp_path / "ints.npy", np.ones((2, 2), int))
    np.save(tmp_path / "flat.npy", np.ones(4))
    np.save(tmp_path / "alone.npy", vectors)
    for name, text in (("few", b"a\n"), ("many", b"a\nb\nc"), ("latin", "é\nb\n".encode("latin-1"))):
        np.save(tmp_path / f"{name}.npy", vectors)
        (tmp_path / f"{name}.keys.txt").write_bytes(text)
    np.savez(tmp_path / "names.npz", ids=np.array(keys), embeddings=vectors)
    np.savez(tmp_path / "three.npz", keys=np.array(keys), vectors=vectors, labels=np.ones(2))
    np.savez(tmp_path / "numbers.npz", keys=np.arange(2) + 0.5, vectors=vectors)
    np.savez(tmp_path / "bytes.npz", keys=np.array([b"a", "é".encode("latin-1")]), vectors=vectors)
    np.savez(tmp_path / "large.npz", keys=np.array(keys), vectors=vectors * 1e200)
    np.savez(tmp_path / "short.npz", keys=np.array(keys[:1]), vectors=vectors)
    parquet("names.parquet", id=keys, embedding=lists)
    parquet("more.parquet", key=keys, vector=lists, label=[1, 2])
    parquet("numbers.parquet", key=[1.0, 2.0], vector=lists)
    parquet("scalars.parquet", key=keys, vector=[1.0, 2.0])
    parquet("ints.parquet", key=keys, vector=[[1], [2]])
    parquet("ragged.parquet", key=keys, vector=pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32())))
    parquet("null.parquet", key=keys, vector=pa.array([[1.0], None], pa.list_(pa.float32())))
    parquet("hole.parquet", key=keys, vector=pa.array([[1.0], [None]], pa.list_(pa.float32())))
    parquet("nokey.parquet", key=pa.array(["a", None]), vector=lists)
    parquet("nothing.parquet", key=pa.array([], pa.string()), vector=pa.array([], pa.list_(pa.float32())))
    (tmp_path / "page.npz").write_bytes(b"<html>")
    cases = {
        "ints.npy": r"are int64 of shape \(2, 2\); must be \(rows, D\) of float16",
        "flat.npy": r"shape \(4,\)",
        "alone.npy": r"have no alone\.keys\.txt beside them",
        "few.npy": r"few\.keys\.txt ends at line 1; must have 2",
        "many.npy": r"many\.keys\.txt:3: a line too many",
        "latin.npy": r"not UTF-8",
        "names.npz": r"holds embeddings, ids; must hold keys and vectors",
        "three.npz": r"holds keys, labels, vectors; must hold keys and vectors",
        "numbers.npz": r"keys is float64 of shape \(2,\); must be \(2,\) of text",
        "bytes.npz": r"row 2 of keys is not UTF-8",
        "large.npz": r"row 1 is zero or not finite in float32",
        "short.npz": r"keys is <U1 of shape \(1,\); must be \(2,\)",
        "names.parquet": r"has the columns id, embedding; must be key and vector",
        "more.parquet": r"must be key and vector",
        "numbers.parquet": r"key is double; must be text or whole numbers",
        "scalars.parquet": r"vector is double; must be a list of floats",
        "ints.parquet": r"must be a list of floats",
        "ragged.parquet": r"row 2 has a vector of 1 numbers, the first row of 2",
        "null.parquet": r"row 2 has no vector",
        "hole.parquet": r"row 2 has no number at place 1",
        "nokey.parquet": r"row 2 has no key",
        "nothing.parquet": r"must have a row and a column",
        "page.npz": r"damaged or of no known kind",
        "absent.npz": r"is not a file",
    }
    for name, match in cases.items():
        with pytest.raises(DataError, match=match) as caught:
            StoredVectors.open(tmp_path / name, tmp_path / "cache")
        assert "\n" not in str(caught.value), name
    assert not [path for path in (tmp_path / "cache").glob("*") if "partial" in path.name]


def test_numbers_bytes_and_columns_are_read_by_either_door(tmp_path):
    vectors = np.random.default_rng(2).normal(size=(5, 3))
    np.savez(tmp_path / "numbers.npz", keys=np.arange(5, dtype=np.uint8), vectors=vectors.astype(np.float16))
    np.savez(
        tmp_path / "bytes.npz",
        keys=np.array(["é", "b", "c", "d", "e"]).astype("U1"),
        vectors=np.asfortranarray(vectors),
    )
    np.savez(tmp_path / "text.npz", keys=np.array([word.encode() for word in "ébcde"]), vectors=vectors)
    column = pa.array(vectors.tolist(), pa.list_(pa.float64()))
    pq.write_table(pa.table({"key": np.arange(5), "vector": column}), tmp_path / "numbers.pq")
    for name, words in (
        ("numbers.npz", "01234"),
        ("bytes.npz", "ébcde"),
        ("text.npz", "ébcde"),
        ("numbers.pq", "01234"),
    ):
        blocks = list(open_vectors(tmp_path / name).blocks())
        assert [key for block in blocks for key in block.keys] == list(words), name
        stored = StoredVectors.open(tmp_path / name, tmp_path / "cache")
        truth = vectors.astype(np.float16 if name == "numbers.npz" else np.float64).astype(np.float64)
        unit = truth / np.linalg.norm(truth, axis=1, keepdims=True)
        np.testing.assert_allclose(stored.rows(list(words)[::-1]), unit[::-1], atol=1e-6)
        np.testing.assert_array_equal(np.concatenate([block.rows_bD for block in blocks]), truth.astype(np.float32))


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_stored_vectors(tmp_path, kind):
    keys, vectors = some_rows()
    path = tmp_path / ("v" + SUFFIX.get(kind, ".parquet"))
    write(kind, path, keys, vectors)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-5], b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged") as caught:
            StoredVectors.open(path, tmp_path / "cache")
        assert "\n" not in str(caught.value)
    if kind == "npz":  # mapped, so that numpy never sees the checksum
        flipped = bytearray(whole)
        place = whole.index(vectors[150].tobytes())
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="damaged"):
            StoredVectors.open(path, tmp_path / "cache")


# --- agreement ---------------------------------------------------------------------------------------------------


class Colours(nn.Module):
    """Means of a few regions through a curve: another channel order, scale or side gives another direction."""

    def forward(self, images):
        parts = F.adaptive_avg_pool2d(images, (2, 3)).flatten(1)
        return torch.cat((torch.tanh(3 * parts), parts.pow(2) - 0.3, torch.sin(5 * parts)), 1)


def coloured_images(count=6):
    generator = torch.Generator().manual_seed(2)
    return F.interpolate(torch.rand(count, 3, 3, 3, generator=generator) * 2 - 1, (24, 24), mode="bilinear").clamp(
        -1, 1
    )


def made_with(tmp_path, spec):
    images = coloured_images()
    keys = [str(n) for n in range(len(images))]
    vectors = FrozenModel(Colours(), 54, "x", spec)(images)
    return stored_as("npz", tmp_path, keys, (vectors * 7).numpy()), images, keys


def test_a_model_agrees_with_its_own_vectors(tmp_path):
    spec = InputSpec(channels="bgr", mean=(1.0, 2.0, 3.0), flip_average=True)
    stored, images, keys = made_with(tmp_path, spec)
    least = check_against_stored(FrozenModel(Colours(), 54, "x", spec), stored, images, stored.find(keys))
    assert 0.99999 < least <= 1.00001


ZERO_TO_ONE = {"mean": (0.0, 0.0, 0.0), "std": (255.0, 255.0, 255.0)}


@pytest.mark.parametrize(
    ("truth", "named"),
    [
        (InputSpec(channels="bgr"), 'agree with channels = "bgr": change'),
        (InputSpec(**ZERO_TO_ONE), "agree with values from 0 to 1 (mean = [0.0, 0.0, 0.0], std = [255.0"),
        (InputSpec(flip_average=True), "agree with flip_average = true: change"),
        (InputSpec(channels="bgr", **ZERO_TO_ONE), 'agree with channels = "bgr" and values from 0 to 1 (mean'),
    ],
)
def test_usual_mistakes_are_named(tmp_path, truth, named):
    stored, images, keys = made_with(tmp_path, truth)
    with pytest.raises(DataError) as caught:
        check_against_stored(FrozenModel(Colours(), 54, "x", OUR_INPUT), stored, images, stored.find(keys))
    assert named in str(caught.value) and "must be 0.99 or more" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_reasons_are_listed(tmp_path):
    stored, images, keys = made_with(tmp_path, OUR_INPUT)
    model = FrozenModel(Colours(), 54, "x", OUR_INPUT)
    with pytest.raises(DataError, match="Likely: other weights, another crop"):
        check_against_stored(model, stored, images, stored.find(keys[1:] + keys[:1]))
    with pytest.raises(DataError, match="have 54 dimensions, the model gives 24"):
        check_against_stored(freeze_net(trained_net(), NET, DIM, OUR_INPUT), stored, images, stored.find(keys))
