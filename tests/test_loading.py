"""Every kind of model file: what loads and equals its original, what is refused, and that no payload ever runs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from tokenopt import safe_archive
from tokenopt.errors import CaptureError, TokenoptError, UsageError
from tokenopt.example_inputs import infer_input_shapes, make_example_inputs
from tokenopt.loading import load_program, parse_input_shapes
from tokenopt.program import Edit, capture, flatten_tensors
from tokenopt.safe_pickle import load_pickle

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

IMAGES = (3, 3, 16, 16)


class Net(nn.Module):
    """A model of the user's own: its class is in no known package."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.second(self.first(x).relu())
        return y if scale is None else y * scale


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5
    )


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )


def vit_config(**settings: Any) -> Any:
    return transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        **settings,
    )


def hf_vit() -> nn.Module:
    return transformers.ViTForImageClassification(vit_config())


def perturbed(model: nn.Module) -> nn.Module:
    """With weights that are nowhere zero or one, so that equal outputs mean equal weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def assert_same(program: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        expected = flatten_tensors(model(*args, **kwargs))
    actual = program.flat(*args, **kwargs)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


# -- payloads --------------------------------------------------------------------------------------------------------


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def hidden_in_module(payload: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].note = payload
    return model


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


CARRIERS: dict[str, Callable[[Any], bytes]] = {
    "module": lambda payload: saved(hidden_in_module(payload)),
    "alone": lambda payload: saved(payload),
    "legacy": lambda payload: saved(payload, _use_new_zipfile_serialization=False),
    "legacy module": lambda payload: saved(hidden_in_module(payload), _use_new_zipfile_serialization=False),
    "state dict": lambda payload: saved({"w": torch.zeros(2), "extra": payload}),
    "nested state dict": lambda payload: saved({"state_dict": {"w": torch.zeros(2)}, "optimizer": [payload]}),
    "key": lambda payload: saved([(payload, 1)]),
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_payload_in_a_pickle_never_runs(tmp_path: Path, carrier: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    path.write_bytes(CARRIERS[carrier](Payload(mark)))
    with pytest.raises(CaptureError) as caught:
        load_program(path)
    assert not mark.exists()
    assert "posix.mkdir" in str(caught.value)
    assert "--trust would run the file's code" in str(caught.value)
    assert ".safetensors" in str(caught.value) and "--arch" in str(caught.value) and ".pt2" in str(caught.value)
    with pytest.raises(TokenoptError):  # whatever is in there, it is no model that can be captured without its inputs
        load_program(path, trust=True)
    assert mark.is_dir()  # so it would have run


class Reduced:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def write_pickle(path: Path, opcodes: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/version", "3\n")
        archive.writestr("model/data.pkl", b"\x80\x02" + opcodes)
    return path


REBUILD = torch._tensor._rebuild_from_type_v2  # torch allows it, and it calls its first argument


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Reduced(nn.Linear, 2, 2), "torch.nn.modules.linear.Linear (to call)"),
        (Reduced(timm.create_model, "vit_tiny_patch16_224"), "timm.models._factory.create_model"),
        (functools.partial(os.mkdir, "x"), "posix.mkdir"),
        (Reduced(getattr, nn.Linear, "__init__"), "builtins.getattr"),
        (Reduced(REBUILD, nn.Linear, Tensor, (2, 2), {}), "Linear (to call)"),
        (Reduced(REBUILD, functools.partial(nn.Linear, 2, 2), Tensor, (), {}), "an object that the file makes"),
        (functools.partial(transformers.ViTModel, "x"), "ViTModel (to refer)"),
        (Reduced(torch.hub.load_state_dict_from_url, "file:///x"), "torch.hub.load_state_dict_from_url"),
    ],
)
def test_allowed_names_cannot_be_misused(tmp_path: Path, value: Any, named: str) -> None:
    """What may be created may not therefore be called, nor handed to the model to call."""
    path = tmp_path / "model.pt"
    path.write_bytes(saved([value]))
    with pytest.raises(CaptureError, match="refusing") as caught:
        load_program(path)
    assert named in str(caught.value)


@pytest.mark.parametrize("module", ["transformers.models.zoedepth.modeling_zoedepth", "spy", "torch.nn.__main__"])
def test_refused_file_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Also what is in a known package is not looked at when another name refuses the file."""
    (tmp_path / "spy.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    path = write_pickle(tmp_path / "model.pt", f"(c{module}\nThing\ncspy\nOther\nt.".encode())
    with pytest.raises(CaptureError, match=r"spy\.Other"):
        load_program(path)
    assert not {name for name in set(sys.modules) - before if not name.startswith("encodings")}


def test_names_that_are_not_installed_are_told_apart(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "model.pt", b"ctimm.models.vision_transformer\nBlockOfTomorrow\n)\x81.")
    with pytest.raises(CaptureError, match="not installed here") as caught:
        load_program(path)
    assert "timm.models.vision_transformer.BlockOfTomorrow" in str(caught.value)


def test_names_that_other_libraries_allow_are_not_ours(tmp_path: Path) -> None:
    """The list in torch is global: any package can add to it."""
    (path := tmp_path / "model.pt").write_bytes(saved(Payload(tmp_path / "mark")))
    with torch.serialization.safe_globals([(os.mkdir, "posix.mkdir")]):
        before = set(torch.serialization.get_safe_globals())
        with pytest.raises(CaptureError, match=r"posix\.mkdir"):
            load_program(path)
        assert set(torch.serialization.get_safe_globals()) == before


# -- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [timm_vit, torchvision_vit, hf_vit])
def test_pickled_model_of_a_known_library(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    """No flag, no input shape; equal to the original, at another batch size than the example's."""
    model = perturbed(build())
    path = tmp_path / "model.pth"
    torch.save(model, path)
    program = load_program(path)
    assert program.dynamic_batch
    images = torch.randn(IMAGES)
    if build is hf_vit:
        assert_same(program, model, pixel_values=images)
    else:
        assert_same(program, model, images)


def test_pickled_diffusers_model(tmp_path: Path) -> None:
    """Its configuration is a FrozenDict, which torch does not fill, and its attention processors are no modules."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, num_layers=1, sample_size=4, norm_num_groups=2
    )
    path = tmp_path / "model.pt"
    torch.save(model, path)
    loaded = load_pickle(path, trust=False)
    assert loaded.config.sample_size == 4
    assert dict(loaded.config) == dict(model.config)
    inputs = {
        "hidden_states": torch.randn(2, 2, 4, 4),
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([3, 4]),
    }
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).sample, model.eval()(**inputs).sample)


def test_data_parallel_is_unwrapped(tmp_path: Path) -> None:
    model = perturbed(timm_vit())
    torch.save({"model": nn.DataParallel(model), "epoch": 3}, tmp_path / "model.pt")
    assert_same(load_program(tmp_path / "model.pt"), model, torch.randn(IMAGES))


def test_own_class_needs_trust(tmp_path: Path) -> None:
    model = perturbed(Net())
    path = tmp_path / "model.pt"
    torch.save(model, path)
    with pytest.raises(CaptureError, match=rf"it names {__name__}\.Net"):
        load_program(path, input_shapes="1x4")
    assert_same(load_program(path, input_shapes="1x4", trust=True), model, torch.randn(3, 4))
    static = load_program(path, input_shapes=["x:2x4"], trust=True, dynamic_batch=False)
    assert static.inputs[0].shape == (2, 4)


def test_trusted_class_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    torch.save(Net(), path)
    monkeypatch.delattr(sys.modules[__name__], "Net")
    with pytest.raises(CaptureError, match="cannot be imported"):
        load_program(path, trust=True)


def test_legacy_whole_model_loads_with_trust_only(tmp_path: Path) -> None:
    model = perturbed(timm_vit())
    path = tmp_path / "model.pt"
    torch.save(model, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CaptureError, match="before 1.6"):
        load_program(path)
    assert_same(load_program(path, trust=True), model, torch.randn(IMAGES))


def test_decoder_does_not_return_its_cache(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=40,
    )
    model = perturbed(transformers.LlamaModel(config))
    torch.save(model, tmp_path / "model.pt")
    program = load_program(tmp_path / "model.pt", input_shapes="input_ids:1x6")
    assert len(program.outputs) == 1
    ids = torch.randint(40, (3, 6))
    assert_same(program, lambda **inputs: model(**inputs, use_cache=False), input_ids=ids)


# -- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "data parallel", "legacy", "safetensors"])
def test_state_dict(tmp_path: Path, form: str) -> None:
    model = perturbed(Net())
    weights = dict(model.state_dict())
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    elif form == "data parallel":
        torch.save({f"module.{key}": value for key, value in weights.items()}, path)
    elif form in ("state_dict", "model"):
        torch.save({form: weights, "epoch": 1, "args": argparse.Namespace(lr=0.1)}, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(UsageError, match="state dict") as caught:
        load_program(path)
    assert "--arch" in str(caught.value)
    program = load_program(path, arch=f"{__name__}:Net", input_shapes="1x4")
    assert_same(program, model, torch.randn(3, 4))


def test_timm_architecture(tmp_path: Path) -> None:
    model = perturbed(timm.create_model("test_vit"))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert_same(load_program(tmp_path / "w.pt", arch="timm:test_vit"), model, torch.randn(3, 3, 160, 160))


def test_missing_and_unexpected_keys(tmp_path: Path) -> None:
    weights, arch = dict(Net().state_dict()), f"{__name__}:Net"
    weights.pop("second.bias")
    weights["extra.weight"] = torch.zeros(2)
    path = tmp_path / "w.pt"
    torch.save(weights, path)
    with pytest.raises(CaptureError) as caught:
        load_program(path, arch=arch, input_shapes="1x4")
    assert "1 missing: second.bias; 1 unexpected: extra.weight" in str(caught.value)
    assert "--allow-missing" in str(caught.value)
    with pytest.warns(UserWarning, match=r"1 missing: second\.bias; 1 unexpected"):
        load_program(path, arch=arch, input_shapes="1x4", allow_missing=True)
    weights["first.bias"] = torch.zeros(7)
    torch.save(weights, path)
    with pytest.raises(CaptureError, match=r"first\.bias \[7\], not \[8\]") as caught:
        load_program(path, arch=arch, input_shapes="1x4", allow_missing=True)
    assert "--allow-missing" not in str(caught.value)


def test_torchvision_architecture(tmp_path: Path) -> None:
    model = perturbed(torchvision.models.squeezenet1_1())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    program = load_program(tmp_path / "w.pt", arch="torchvision:squeezenet1_1", input_shapes="1x3x32x32")
    assert_same(program, model, torch.randn(2, 3, 32, 32))


def test_callable_architecture_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "class Builders:\n"
        "    small = staticmethod(lambda: nn.Sequential(nn.Linear(4, 2)))\n"
        "    broken = staticmethod(lambda: 1 / 0)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 2))
    torch.save(model.state_dict(), "w.pt")
    program = load_program("w.pt", arch="my_models:Builders.small", input_shapes="1x4")
    assert_same(program, model, torch.randn(3, 4))
    with pytest.raises(CaptureError, match="division by zero"):
        load_program("w.pt", arch="my_models:Builders.broken", input_shapes="1x4")
    for arch in ("my_models:absent", "my_models:number", "absent_module:x", "my_models:", "nothing"):
        with pytest.raises(UsageError):
            load_program("w.pt", arch=arch, input_shapes="1x4")


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("timm:vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("timm:hf-hub:someone/model", "no architecture"),
        ("torchvision:vit_b_17", "vit_b_16"),
        ("hf:/nowhere", "no configuration"),
    ],
)
def test_unknown_architectures(tmp_path: Path, arch: str, said: str) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UsageError) as caught:
        load_program(tmp_path / "w.pt", arch=arch)
    assert said in str(caught.value)


def write_config(folder: Path, config: Any, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **fields}))
    return folder


def test_transformers_architecture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = perturbed(hf_vit())
    folder = write_config(tmp_path / "vit", model.config, architectures=["ViTForImageClassification"])
    torch.save(model.state_dict(), tmp_path / "w.pt")
    capfd.readouterr()
    program = load_program(tmp_path / "w.pt", arch=f"hf:{folder}")
    assert capfd.readouterr() == ("", "")
    assert_same(program, model, pixel_values=torch.randn(IMAGES))
    bad = {**model.state_dict(), "classifier.weight": torch.zeros(3, 3), "extra": torch.zeros(1)}
    torch.save(bad, tmp_path / "w.pt")
    with pytest.raises(CaptureError, match=r"classifier\.weight \[3, 3\], not \[2, 16\].*1 unexpected: extra"):
        load_program(tmp_path / "w.pt", arch=f"hf:{folder}")


def test_transformers_tied_weights_are_not_missing(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    model = perturbed(transformers.BertForMaskedLM(config))
    folder = write_config(tmp_path / "bert", config, architectures=["BertForMaskedLM"])
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("cls.predictions.decoder")}
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="--input-shape"):  # a text model does not say how long its input is
        load_program(tmp_path / "w.pt", arch=f"hf:{folder}")
    program = load_program(tmp_path / "w.pt", arch=f"hf:{folder}", input_shapes="input_ids:1x6,attention_mask:1x6")
    inputs = {"input_ids": torch.randint(40, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    assert_same(program, model, **inputs)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}},
        {"_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel"},
        {"hidden_size": "many"},
    ],
)
def test_configuration_never_fetches_or_runs_code(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = write_config(tmp_path / "vit", vit_config(), **fields)
    mark = tmp_path / "mark"
    (folder / "code.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    torch.save(hf_vit().state_dict(), tmp_path / "w.pt")
    with pytest.raises(CaptureError, match="cannot be built") as caught:
        load_program(tmp_path / "w.pt", arch=f"hf:{folder}")
    assert "nothing is downloaded" in str(caught.value)
    assert not mark.exists()


# -- exported programs -----------------------------------------------------------------------------------------------


def test_own_program_round_trip(tmp_path: Path) -> None:
    model = perturbed(Net())
    program = capture(model, torch.randn(2, 4))
    program.provenance.append(Edit("reduce-tokens{keep=0.5}", "blocks.0", 10, 5))
    loaded = load_program(program.save(tmp_path / "program.pt2"))
    assert loaded.provenance == program.provenance
    assert loaded.inputs == program.inputs and loaded.dynamic_batch
    assert_same(loaded, model, torch.randn(3, 4))
    again = load_program(loaded.save(tmp_path / "program.pt2"))
    assert_same(again, model, torch.randn(3, 4))
    for options in ({"arch": "timm:test_vit"}, {"input_shapes": "1x4"}):
        with pytest.raises(UsageError, match="leave out"):
            load_program(tmp_path / "program.pt2", **options)


class InPlace(nn.Module):
    def forward(self, images: dict[str, Tensor], bias: Tensor, mode: str = "bilinear") -> dict[str, Tensor]:
        y = images["left eye"] * 2
        y.add_(bias).relu_()
        return {"a b": y, "resized": nn.functional.interpolate(y[:, None, None], scale_factor=2.0, mode=mode)}


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])  # the content decides
def test_foreign_program_becomes_functional(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = InPlace()
    args = ({"left eye": torch.randn(4, 3)}, torch.randn(4, 3))
    rows = {0: Dim("rows", min=2, max=64)}
    exported = torch.export.export(model, args, {"mode": "nearest"}, dynamic_shapes=({"left eye": rows}, rows, None))
    with (tmp_path / f"m{suffix}").open("wb") as file:
        file.write(exported_bytes(exported))
    capfd.readouterr()
    program = load_program(tmp_path / f"m{suffix}")
    assert capfd.readouterr() == ("", "")
    assert program.provenance == []
    assert not any(n.op == "call_function" and n.target._schema.is_mutable for n in program.graph.nodes)
    assert_same(program, model, {"left eye": torch.randn(5, 3)}, torch.randn(5, 3), mode="nearest")


def exported_bytes(exported: Any) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def test_program_without_example_gets_one(tmp_path: Path) -> None:
    exported = torch.export.export(Net(), (torch.randn(2, 4),), dynamic_shapes=({0: Dim("b", min=1)},))
    exported.example_inputs = None
    (tmp_path / "m.pt2").write_bytes(exported_bytes(exported))
    program = load_program(tmp_path / "m.pt2")
    assert program.flat(*program.example_inputs[0], **program.example_inputs[1])[0].shape == (2, 2)


def test_symbolic_sizes_and_guards_of_real_programs_pass(tmp_path: Path) -> None:
    class Resize(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            if x.shape[0] % 2 == 0 and x.shape[1] > y.shape[0] // 3:
                x = nn.functional.interpolate(x[None, None], scale_factor=1.5, mode="bilinear")[0, 0, : x.shape[1] - 1]
            return torch.einsum("ij,k->ijk", x, y)

    sizes = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "y": {0: Dim.DYNAMIC}}
    exported = torch.export.export(Resize(), (torch.randn(6, 8), torch.randn(5)), dynamic_shapes=sizes)
    (tmp_path / "m.pt2").write_bytes(exported_bytes(exported))
    assert_same(load_program(tmp_path / "m.pt2"), Resize(), torch.randn(8, 10), torch.randn(7))


def test_result_types_of_transformers_load_in_a_fresh_process(tmp_path: Path) -> None:
    capture(hf_vit(), {"pixel_values": torch.randn(2, 3, 16, 16)}).save(tmp_path / "m.pt2")
    code = (
        "import sys; from tokenopt.loading import load_program\n"
        f"p = load_program({str(tmp_path / 'm.pt2')!r})\n"
        "import torch; print(type(p(pixel_values=torch.zeros(1, 3, 16, 16))).__name__)\n"
        "assert 'timm' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (result.stdout.strip(), result.stderr) == ("ImageClassifierOutput", "")


def test_program_of_unknown_types_operations_and_versions(tmp_path: Path, base: Path) -> None:
    def edit(change: Callable[[Any], None]) -> Path:
        return rewritten(base, tmp_path / "m.pt2", {"models/model.json": edited(change)})

    def result_type(fields: Any) -> None:
        signature = fields["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = signature["out_spec"].replace("builtins.dict", "somewhere.Result")

    def operation(fields: Any) -> None:
        fields["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.linear_of_tomorrow.default"

    with pytest.raises(CaptureError, match=r"somewhere\.Result is not registered"):
        load_program(edit(result_type))
    with pytest.raises(CaptureError, match=r"linear_of_tomorrow\S* is not registered"):
        load_program(edit(operation))
    path = capture(Net(), torch.randn(2, 4)).save(tmp_path / "own.pt2")
    newer = rewritten(path, tmp_path / "m.pt2", {"extra/tokenopt.json": lambda _: b'{"version": 99, "provenance": []}'})
    with pytest.raises(CaptureError, match="newer tokenopt"):
        load_program(newer)
    broken = rewritten(path, tmp_path / "m.pt2", {"extra/tokenopt.json": lambda _: b'{"version": 1}'})
    with pytest.raises(CaptureError, match="damaged"):
        load_program(broken)
    empty = rewritten(path, tmp_path / "m.pt2", {"models/model.json": lambda _: None})
    with pytest.raises(CaptureError, match="holds no exported program"):
        load_program(empty)


# Everything that torch.export.load would unpickle, import or evaluate.


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = torch.ones(4)

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
        return {"a": self.linear(x) + y * self.table}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    batch = {0: Dim("batch", min=1)}
    inputs = (torch.randn(2, 4),), {"y": torch.randn(2, 4)}
    exported = torch.export.export(Keywords(), *inputs, dynamic_shapes={"x": batch, "y": batch})
    path = tmp_path_factory.mktemp("base") / "base.pt2"
    torch.export.save(exported, path)
    return path


def rewritten(source: Path, target: Path, changes: dict[str, Callable[[bytes], bytes | None]]) -> Path:
    """A copy of an archive with members changed, removed (None) or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        contents = {name.removeprefix(f"{root}/"): old.read(name) for name in old.namelist()}
        for name in {**contents, **changes}:
            data = changes[name](contents.get(name, b"")) if name in changes else contents[name]
            if data is not None:
                new.writestr(f"{root}/{name}", data)
    return target


def edited(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        fields = json.loads(data)
        change(fields)
        return json.dumps(fields).encode()

    return apply


def attack_size(fields: Any, code: str) -> None:
    values = fields["graph_module"]["graph"]["tensor_values"].values()
    next(s for v in values for s in v["sizes"] if "as_expr" in s)["as_expr"]["expr_str"] = code


def attack_named_metadata(fields: Any, code: str) -> None:
    """The values of a graph are named by the file: none of the names may switch the checks off."""
    graph = fields["graph_module"]["graph"]
    values = graph["tensor_values"]
    attack_size(fields, code)
    name = next(n for n, v in values.items() if any("as_expr" in s for s in v["sizes"]))
    text = json.dumps(fields).replace(f'"{name}"', '"metadata"')
    fields.clear()
    fields.update(json.loads(text))


def attack_guard(fields: Any, code: str) -> None:
    fields["guards_code"] = [f"{code} is None"]


def attack_keyword(fields: Any, code: str) -> None:
    signature = fields["graph_module"]["module_call_graph"][0]["signature"]
    spec = json.loads(signature["in_spec"])
    spec[1]["children_spec"][1]["context"] = json.dumps([f"y':{code},'y"])
    signature["in_spec"] = json.dumps(spec)


def attack_enumeration(fields: Any, code: str) -> None:
    signature = fields["graph_module"]["module_call_graph"][0]["signature"]
    spec = json.loads(signature["out_spec"])
    spec[1]["context"] = json.dumps([{"__enum__": True, "fqn": "antigravity:fly", "name": "a"}])
    signature["out_spec"] = json.dumps(spec)


def attack_factory(fields: Any, code: str) -> None:
    signature = fields["graph_module"]["module_call_graph"][0]["signature"]
    spec = json.loads(signature["out_spec"])
    factory = {"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": ["a"]}
    spec[1] |= {"type": "collections.defaultdict", "context": factory}
    signature["out_spec"] = json.dumps(spec)


def attack_call(fields: Any, code: str) -> None:
    fields["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.mkdir"


def attack_file(fields: Any, code: str) -> None:
    node = fields["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.ops.aten.from_file.default"
    node["inputs"] = [
        {"name": "filename", "arg": {"as_string": code.split("'")[3]}, "kind": 1},
        {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
        {"name": "size", "arg": {"as_int": 4}, "kind": 1},
    ]


def attack_name(fields: Any, code: str) -> None:
    text = json.dumps(fields).replace('"linear"', json.dumps(f"linear={code}"))
    fields.clear()
    fields.update(json.loads(text))


def attack_parameter(fields: Any, code: str) -> None:
    spec = next(s for s in fields["graph_module"]["signature"]["input_specs"] if "parameter" in s)
    spec["parameter"]["parameter_name"] = f'linear.x"+{code}+"'


DESCRIPTIONS = [
    attack_size,
    attack_named_metadata,
    attack_guard,
    attack_keyword,
    attack_enumeration,
    attack_factory,
    attack_call,
    attack_file,
    attack_name,
    attack_parameter,
]
RUN_BY_TORCH = (attack_size, attack_named_metadata, attack_guard, attack_file)


@pytest.mark.parametrize("attack", DESCRIPTIONS)
def test_description_of_a_program_is_never_evaluated(
    tmp_path: Path, base: Path, attack: Callable[[Any, str], None]
) -> None:
    mark = tmp_path / "mark"
    code = f"__import__('os').mkdir('{mark}')"
    path = rewritten(base, tmp_path / "m.pt2", {"models/model.json": edited(lambda fields: attack(fields, code))})
    with pytest.raises(CaptureError, match="refusing to load a .pt2 that may run code") as caught:
        load_program(path)
    assert "--trust" in str(caught.value)
    assert not mark.exists() and "antigravity" not in sys.modules
    if attack in RUN_BY_TORCH:  # so it would have run
        with contextlib.suppress(Exception), path.open("rb") as file:
            torch.export.load(file).module()(torch.randn(2, 4), y=torch.randn(2, 4))
        assert mark.exists()


@pytest.mark.parametrize(
    "member", ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt", "pickled constant"]
)
def test_payload_in_a_program_never_runs(tmp_path: Path, base: Path, member: str) -> None:
    mark = tmp_path / "mark"
    data = saved(((Payload(mark),), {}))
    changes: dict[str, Callable[[bytes], bytes | None]] = {member: lambda _: data}
    if member == "pickled constant":

        def pickled(fields: Any) -> None:
            next(iter(fields["config"].values()))["use_pickle"] = True

        changes = {
            "data/constants/model_constants_config.json": edited(pickled),
            "data/constants/tensor_0": lambda _: data,
        }
    path = rewritten(base, tmp_path / "m.pt2", changes)
    with pytest.raises(CaptureError, match=r"posix\.mkdir"):
        load_program(path)
    assert not mark.exists()
    with pytest.raises(CaptureError):  # the payload is no tensor
        load_program(path, trust=True)
    assert mark.exists()


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (
            safe_archive._check_size,
            ["s77", "2*s77 + 1", "Symbol('s77', positive=True, integer=True)", "-1", "int_oo", "Eq(s0, 4)"]
            + ["Max(Integer(1), TruncToInt(Mul(Float('1.5', precision=53), ToFloat(Symbol('s53')))))"],
            [
                "exec('x')",
                "Symbol('s').func",
                "Integer(2)(3)",
                "Symbol('a.b')",
                "Add('f(x)')",
                "[s for s in t]",
                "lambda: 1",
            ]
            + ["1 # )", "1\n", "s0[0]", "(s := 1)", "f'{s}'", "Add(*s)", "", "sympify('1')", "open(s)"],
        ),
        (
            safe_archive._check_guard,
            ["(L['x'].size()[0] % 2) == 0", "L['a b'][0].size()[1] > (L['y'].size()[0] // 3)", "L['n'] == 3"]
            + ["2*L['x'].size()[2] > math.trunc(1.5*torch.sym_float(L['x'].size()[2]))", "max(1, L['n']) <= math.inf"],
            [
                "open('x')",
                "L['x']()",
                "L['x'].__class__",
                "L['x'].size().__class__",
                "torch.load('x')",
                "math.os.system",
            ]
            + [
                "L['x'].size()[0] == 1 #",
                "(lambda: 1)()",
                "[x for x in L]",
                "f'{L}'",
                "L['\"']",
                "max(*L)",
                "",
                "getattr(L, 'x')",
            ],
        ),
    ],
)
def test_grammar_of_sizes_and_guards(check: Callable[[str], None], good: list[str], bad: list[str]) -> None:
    for text in good:
        check(text)
    for text in bad:
        with pytest.raises(safe_archive._Unsafe):
            check(text)


def test_compiled_code_and_pickled_objects_in_a_program_are_refused(tmp_path: Path, base: Path) -> None:
    compiled = rewritten(base, tmp_path / "m.pt2", {"data/aotinductor/model/model.so": lambda _: b"\x7fELF"})
    with pytest.raises(CaptureError, match="compiled code"):
        load_program(compiled)

    def opaque(fields: Any) -> None:
        next(iter(fields["config"].values()))["path_name"] = "opaque_obj_0"

    config = "data/constants/model_constants_config.json"
    mark = tmp_path / "mark"
    changes = {
        config: edited(opaque),
        "data/constants/opaque_obj_0": lambda _: pickle.dumps(Payload(mark)),
    }
    with pytest.raises(CaptureError, match="pickled object"):
        load_program(rewritten(base, tmp_path / "m.pt2", changes))
    assert not mark.exists()


def test_restriction_is_undone_after_loading(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the user's environment asks for the opposite."""
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before, allowed = dict(os.environ), set(torch.serialization.get_safe_globals())
    load_program(base)
    assert dict(os.environ) == before
    assert constants.HF_HUB_OFFLINE is False
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert capfd.readouterr() == ("", "")


# -- files that are not models ---------------------------------------------------------------------------------------


def test_files_that_are_no_models(tmp_path: Path) -> None:
    def refused(name: str, data: bytes, said: str) -> None:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CaptureError) as caught:
            load_program(path, arch="timm:test_vit")
        assert said in str(caught.value), str(caught.value)
        assert str(path) in str(caught.value)

    whole = saved(timm_vit().state_dict())
    legacy = saved({"w": torch.randn(40)}, _use_new_zipfile_serialization=False)
    refused("empty.pt", b"", "empty")
    refused("text.pt", b"hello, world\n" * 80, "no format of torch")
    refused("truncated.pt", whole[: len(whole) // 2], "damaged")
    refused("truncated.pt", legacy[:40], "damaged")
    refused("short.pt", legacy[:-30], "damaged")
    refused("header.safetensors", (1 << 60).to_bytes(8, "little") + b"{}", "damaged")
    refused("header.bin", (1 << 60).to_bytes(8, "little") + b"{}", "damaged")
    refused("truncated.safetensors", b"\x08\x00", "damaged")
    refused("pickle.pt", pickle.dumps({"a": 1}), "damaged")
    refused("list.pt", saved([1, 2]), "holds a list")
    refused("nothing.pt", saved({}), "holds a dict")
    refused("checkpoint.pt", saved({"epoch": 3, "optimizer": {}}), "with the keys epoch, optimizer")
    refused("tensor.pt", saved(torch.zeros(2)), "holds a Tensor")
    refused("model.onnx", b"\x08\x0a\x12\x07pytorch", "ONNX")
    refused("model.bin", b"\x08\x0a\x12\x07pytorch", "ONNX")
    refused("old.pt", b"\0" * 257 + b"ustar" + b"\0" * 300, "0.1.10")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/b.npy", b"x")
    refused("arrays.npz", archive.getvalue(), "torch did not write")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("serialized_exported_program.json", "{}")
    refused("old.pt2", archive.getvalue(), "torch 2.7")
    for path, said in (
        (tmp_path / "absent.pt", "no such file"),
        (tmp_path, "directory"),
        (Path(os.devnull), "regular"),
    ):
        with pytest.raises(CaptureError, match=said):
            load_program(path)


def test_torchscript_is_recognised(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "model.pt")
    with pytest.raises(CaptureError, match="TorchScript") as caught:
        load_program(tmp_path / "model.pt")
    assert "start from the nn.Module" in str(caught.value)


def test_directory_of_transformers_says_what_to_give(tmp_path: Path) -> None:
    write_config(tmp_path, vit_config())
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CaptureError, match=rf"model\.safetensors --arch hf:{tmp_path}"):
        load_program(tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CaptureError, match="Permission denied"):
        load_program(path)


@pytest.mark.parametrize("kind", ["pickle", "legacy", "pt2", "safetensors"])
def test_damaged_files_raise_nothing_else(tmp_path: Path, base: Path, kind: str) -> None:
    """Cut anywhere, or with any byte changed: it loads, or it is one clear error."""
    from safetensors.torch import save

    good = {
        "pickle": lambda: saved(nn.Sequential(nn.Linear(4, 4))),
        "legacy": lambda: saved(nn.Linear(4, 4).state_dict(), _use_new_zipfile_serialization=False),
        "pt2": base.read_bytes,
        "safetensors": lambda: save({"w": torch.zeros(4)}),
    }[kind]()
    pick = random.Random(0)
    path = tmp_path / "model.pt"

    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        try:
            if kind == "pt2":
                safe_archive.load_exported(path, "x", trust=False)
            elif kind == "safetensors":
                load_program(path)
            else:
                load_pickle(path, trust=False)
        except TokenoptError as error:
            assert str(path) in str(error)

    for _ in range(40):
        attempt(good[: pick.randrange(len(good))])
    for _ in range(120):
        data = bytearray(good)
        data[pick.randrange(len(data))] = pick.randrange(256)
        attempt(bytes(data))


@given(st.binary(max_size=200))
def test_random_pickles_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = write_pickle(tmp_path_factory.getbasetemp() / "random.pt", data)
    try:
        load_pickle(path, trust=False)
    except CaptureError:
        pass


# -- inputs ----------------------------------------------------------------------------------------------------------

FLOAT = torch.float32


@pytest.mark.parametrize(
    ("texts", "shapes"),
    [
        ("1x3x224x224", {None: ((1, 3, 224, 224), FLOAT)}),
        ("1,3,224,224", {None: ((1, 3, 224, 224), FLOAT)}),
        ("x:1x3x8x8", {"x": ((1, 3, 8, 8), FLOAT)}),
        ("x:1,3,8,8", {"x": ((1, 3, 8, 8), FLOAT)}),
        (["x:1X3", "y:2x4:float16"], {"x": ((1, 3), FLOAT), "y": ((2, 4), torch.float16)}),
        ("x:1x3, y:2x4:bool", {"x": ((1, 3), FLOAT), "y": ((2, 4), torch.bool)}),
        ("x:1,3,y:2,4:int32", {"x": ((1, 3), FLOAT), "y": ((2, 4), torch.int32)}),
        ("t:2:int64,x:2x3", {"t": ((2,), torch.int64), "x": ((2, 3), FLOAT)}),
        ("input_ids:1x128:int64", {"input_ids": ((1, 128), torch.int64)}),
        ("input_ids:1x8,attention_mask:1x8", {n: ((1, 8), torch.int64) for n in ("input_ids", "attention_mask")}),
        ((), {}),
    ],
)
def test_input_shapes(texts: Any, shapes: Any) -> None:
    assert parse_input_shapes(texts) == shapes


@pytest.mark.parametrize(
    "text",
    ["", "x", "x:", "1x", "1xx3", "x:0x3", "-1x3", "1.5x2", "a b:1x3", "1x3;1x4", "1x3,1x4", "x:1,x:2"]
    + ["1x3:int99", "1x3:load", "1x3:float8_e4m3fn", "1x3:complex64"],
)
def test_bad_input_shapes(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_input_shapes(text)
    assert "--input-shape" in str(caught.value) or "float32" in str(caught.value)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True),
        st.tuples(st.lists(st.integers(1, 999), min_size=1, max_size=5), st.sampled_from(["float32", "int64", "bool"])),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from("x,"),
)
def test_input_shapes_round_trip(inputs: dict[str, tuple[list[int], str]], separator: str) -> None:
    texts = [f"{name}:{separator.join(map(str, shape))}:{dtype}" for name, (shape, dtype) in inputs.items()]
    expected = {name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in inputs.items()}
    assert parse_input_shapes(texts) == expected
    assert parse_input_shapes(",".join(texts)) == expected


def test_image_models_know_their_inputs() -> None:
    video = transformers.VideoMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, num_frames=4
    )
    digits = timm.models.VisionTransformer(
        img_size=(8, 12), patch_size=2, in_chans=1, embed_dim=16, depth=1, num_heads=2
    )
    known = [
        (timm_vit(), None, (1, 3, 16, 16)),
        (digits, None, (1, 1, 8, 12)),
        (timm.create_model("test_convnext"), None, (1, 3, 160, 160)),
        (torchvision_vit(), None, (1, 3, 16, 16)),
        (hf_vit(), "pixel_values", (1, 3, 16, 16)),
        (transformers.VideoMAEModel(video), "pixel_values", (1, 4, 3, 32, 32)),
    ]
    for model, name, shape in known:
        assert infer_input_shapes(model) == {name: (shape, FLOAT)}
    with pytest.raises(UsageError, match="--input-shape") as caught:
        infer_input_shapes(Net())
    assert "(x, scale)" in str(caught.value)


def test_example_inputs() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.types = nn.Embedding(50, 4), nn.Embedding(3, 4)

        def forward(self, ids: Tensor, mask: Tensor, weight: Tensor, flag: Tensor | None = None) -> Tensor:
            raise NotImplementedError

    model = Text()
    shapes = parse_input_shapes("ids:4x50:int64,mask:4x50:float32,weight:4x2")
    first, second = make_example_inputs(model, shapes), make_example_inputs(model, shapes)
    assert isinstance(first, tuple)  # they are the first arguments
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    ids, mask, weight = first
    assert ids.dtype == torch.int64 and set(ids.unique().tolist()) == {0, 1, 2}
    assert mask.eq(1).all() and weight.std() > 0.3
    shapes = parse_input_shapes("mask:4x5:bool,weight:4x2,ids:4x5:int64")
    by_name = make_example_inputs(model, shapes)
    assert list(by_name) == ["mask", "weight", "ids"] and by_name["mask"].all()
    unnamed = make_example_inputs(model, parse_input_shapes(["4x5:int64", "mask:4x5", "weight:4x2"]))
    assert unnamed[0].dtype == torch.int64
    for bad, said in (
        ("ids:4x5:int64", "also needs mask, weight"),
        ("1x2,ids:1x2", "no place"),
        ("z:1x2", "not take z"),
    ):
        with pytest.raises(UsageError, match=said):
            make_example_inputs(model, parse_input_shapes(bad))
    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
        )
    )
    named = make_example_inputs(bert, parse_input_shapes("input_ids:4x50,token_type_ids:4x50"))
    assert named["input_ids"].max() > 30 and named["token_type_ids"].max() == 1


def test_inputs_that_do_not_fit_are_one_error(tmp_path: Path) -> None:
    torch.save(timm_vit(), tmp_path / "model.pt")
    for shape in ("1x3x15x16", "1x16", "1x3x16x16:int64"):
        with pytest.raises(CaptureError, match="cannot be captured"):
            load_program(tmp_path / "model.pt", input_shapes=shape)
