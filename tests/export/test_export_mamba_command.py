"""hcmen-export-mamba: a model by its factory or by transformers, with its weights, to one file; refusals are a line."""

from __future__ import annotations

import json
import pickle

import onnx
import pytest
import torch
from helpers import foreign_models as models

from hcmen.base.errors import InputError
from hcmen.export.commands.export_mamba import main
from hcmen.export.foreign import example, load_weights, parse_dynamic, parse_input

FACTORY = "helpers.foreign_models:"


def run(capsys, *words):
    """(exit code, stdout, stderr without what -q leaves out)."""
    code = main.main([str(word) for word in (*words, "-q")], standalone_mode=False)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_model_by_its_factory_with_its_weights(capsys, tmp_path):
    made = models.Mixer()
    with torch.no_grad():
        made.D += 3
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": x for k, x in made.state_dict().items()}}, tmp_path / "w.pth")
    out = tmp_path / "m.onnx"
    code, told, err = run(
        capsys,
        *("--factory", FACTORY + "Mixer", "--checkpoint", tmp_path / "w.pth", "--input", "f32[2,9,8]"),
        *("--dynamic", "0=batch,1=time", "--out", out, "--format", "json"),
    )
    assert (code, err) == (0, "")
    report = json.loads(told)
    assert [(row["name"], row["open"]) for row in report["sizes"]] == [("batch", True), ("time", True)]
    assert report["verified"]
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(out).graph.initializer}
    assert any((x == 4).all() for x in weights.values() if x.shape == (8,))
    code, _, err = run(capsys, "--factory", FACTORY + "Mixer", "--input", "f32[2,9,8]", "--out", out)
    assert code == 2
    assert "something is there already" in err


def test_a_model_of_transformers_by_its_folder(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "lm")
    capsys.readouterr()
    code, out, err = run(capsys, "--hf", tmp_path / "lm", "--out", tmp_path / "lm.onnx", "--states", "--last-step")
    assert (code, err) == (0, "")
    assert "input_ids axis 1: open, 'time'" in out
    assert "channels-last Mamba-1: rewritten" in out
    assert "states: 2, from" in out
    assert len(onnx.load(tmp_path / "lm.onnx").graph.output) == 3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "the model is named nowhere, expected --factory or --hf"),
        (["--factory", "a:b", "--hf", "c"], 2, "the model is named twice"),
        (["--factory", "helpers"], 2, "--factory is 'helpers', expected package.module:function"),
        (["--factory", "no_such_package:f"], 2, "cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        (["--factory", "with_triton:f"], 2, "triton's own kernels need CUDA"),
        (["--factory", FACTORY + "absent"], 2, "has no 'absent'"),
        (["--factory", FACTORY + "THING"], 2, "it is a int, expected a function or class"),
        (["--factory", FACTORY + "raising"], 2, "it raises ValueError: no such size"),
        (["--factory", FACTORY + "number"], 2, "it gives a int, expected a torch.nn.Module"),
        (["--factory", FACTORY + "Mixer"], 2, "there is no --input"),
        (["--factory", FACTORY + "Mixer", "--input", "f32[2,x]"], 2, "--input is 'f32[2,x]', expected such as"),
        (["--factory", FACTORY + "Mixer", "--input", "f32[2,8,8]", "--dynamic", "0"], 2, "--dynamic is '0', expected"),
        (["--factory", FACTORY + "Mixer", "--input", "f32[1,8,8]"], 2, "has size 1 on axis 0"),
        (["--factory", FACTORY + "Plain", "--input", "f32[2,8,8]"], 2, "makes no convolution or scan of hcmen's"),
        (["--factory", FACTORY + "Stumbling", "--input", "f32[2,8,9]"], 2, "the model does not run on the example"),
        (["--factory", FACTORY + "Text", "--input", "f32[2,8,8]"], 2, "the model gives a str"),
        (["--factory", FACTORY + "Noisy", "--input", "f32[2,8,8]"], 1, "it draws random numbers"),
        (["--factory", FACTORY + "Mixer", "--checkpoint", "other.pth"], 2, "it lacks 'A_log' and 3 more"),
        (["--factory", FACTORY + "Mixer", "--checkpoint", "wide.pth"], 2, "it has another size of 'weight'"),
        (["--factory", FACTORY + "Mixer", "--checkpoint", "list.pth"], 2, "it holds a list without tensors"),
        (["--factory", FACTORY + "Mixer", "--checkpoint", "hostile.pth"], 5, "no checkpoint of tensors alone"),
        (["--factory", FACTORY + "Mixer", "--checkpoint", "noise.pth"], 5, "no checkpoint of tensors alone"),
        (["--factory", FACTORY + "Mixer", "--checkpoint", "noise.safetensors"], 5, "no checkpoint of tensors alone"),
        (["--factory", FACTORY + "Mixer", "--checkpoint", "absent.pth"], 2, "absent.pth: no such file"),
        (["--hf", "x", "--checkpoint", "other.pth"], 2, "--checkpoint with --hf"),
        (["--hf", "x", "--last-step"], 2, "--last-step without --states"),
        (["--hf", "/no/such/folder"], 2, "transformers cannot load it"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_file(capsys, tmp_path, monkeypatch, words, code, message):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "run.txt"), "w"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "with_triton.py").write_text("raise ImportError('no jit there', name='triton.language')\n")
    torch.save({"D": torch.ones(8)}, "other.pth")
    torch.save({**models.Mixer().state_dict(), "weight": torch.ones(9, 4)}, "wide.pth")
    torch.save([1], "list.pth")
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    for name in ("noise.pth", "noise.safetensors"):
        (tmp_path / name).write_bytes(b"\x80" * 99)
    before = sorted(tmp_path.iterdir())
    got, out, err = run(capsys, *words, "--out", "m.onnx")
    assert message in err
    assert (got, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == before


def test_inputs_are_what_they_say():
    name, x = parse_input("ids=i64[2, 50:3..5]")
    assert (name, x.dtype, x.shape, x.unique().tolist()) == ("ids", torch.int64, (2, 50), [3, 4, 5])
    assert parse_input("f16[2,3]")[1].dtype == torch.float16
    assert parse_input("bool[7]")[1].dtype == torch.bool
    assert parse_input("f32[]")[1].shape == ()
    assert torch.equal(parse_input("f32[4]")[1], parse_input("f32[4]")[1])
    for text in (
        "f31[2]",
        "f32(2)",
        "f32[-1]",
        "i64[2:9..1]",
        "f32[2:0..1]",
        f"f32[{1 << 40}]",
        "f32[2,,3]",
        "f32[9e9]",
    ):
        with pytest.raises(InputError, match="--input"):
            parse_input(text)
    with pytest.raises(InputError, match="a name for each, or for none"):
        example(["f32[2]", "a=f32[2]"], models.Plain())
    with pytest.raises(InputError, match="two --input have one name"):
        example(["a=f32[2]", "a=f32[2]"], models.Plain())


def test_sizes_are_asked_for_of_all_inputs_or_of_each():
    assert parse_dynamic([]) == parse_dynamic(["auto"]) == "auto"
    assert parse_dynamic(["none"]) is None
    assert parse_dynamic(["0=batch,1=time"]) == {0: "batch", 1: "time"}
    assert parse_dynamic(["x:0=batch", "ids:0=batch, 1=time"]) == {"x": {0: "batch"}, "ids": {0: "batch", 1: "time"}}
    for texts in (["0"], ["0=1"], ["0=a,0=b"], ["a=0"], ["x:0=a", "x:1=b"], ["0=a", "x:1=b"], [":0=a"], [""]):
        with pytest.raises(InputError, match="--dynamic"):
            parse_dynamic(texts)


def test_weights_of_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    model, other = models.Mixer(), models.Mixer()
    with torch.no_grad():
        other.D *= 2
    save_file(dict(other.state_dict()), tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.D, other.D)
