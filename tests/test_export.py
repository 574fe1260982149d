"""Exported files compute what the model computes, at sizes that they were not exported at."""

import json

import pytest
import torch

from cpvt.config import ConfigError, ModelConfig
from cpvt.model import export
from cpvt.model.encodings import PEG
from cpvt.model.vit import VisionTransformer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

P = 4  # pixels a token


def build(encoding: str, depth: int = 1, **options) -> VisionTransformer:
    torch.manual_seed(0)
    config = ModelConfig((5 * P, 6 * P), P, 3, 7, 16, depth, 2, encoding=encoding, **options)
    model = VisionTransformer(config)
    for parameter in model.parameters():  # larger than at the start, so that every part shows in the logits
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# One block deep: a PEG behind it shows in the logits only without a class token ("gap"), before it always.
# Every kind, option and read-out; sums, as a sum is right only where each of its parts is.
MODELS = {
    "tables, distilled": (
        "learned + rotary(resize='rescale') + peg(on='queries_keys', shared=True, positions=(-1,))",
        {"distilled": True},
    ),
    "tables, no class token": (
        "learned(antialias=True) + sine + sine(resize='resample') + sine(resize='rescale') + rotary",
        {"readout": "gap"},
    ),
    "relative on values": ("relative(clip=3, on='keys_values')", {}),
    "relative, no class token": (
        "relative(clip=3) + relative(clip=3, on='bias', wrap=True) + relative(on='bias')",
        {"readout": "gap"},
    ),
    "pegs with padding": (
        "peg(positions=(-1,), kernel=11, compute='matrix') + peg(padding='circular')"
        " + peg(padding='reflect', kernel=5) + peg(positions=(-1,), padding='replicate')",
        {"readout": "gap"},
    ),
    "pegs without": (
        "peg(convolution='separable') + peg(convolution='dense', kernel=1, repeat=2)"
        " + peg(padding='none', skip=False)",
        {"readout": "gap"},
    ),
}


@pytest.mark.parametrize("encoding, options", MODELS.values(), ids=MODELS)
def test_onnx_at_every_size(tmp_path, encoding, options):
    model = build(encoding, **options).train()
    report = export.export_onnx(model, tmp_path / "model.onnx")
    assert report.difference <= export.TOLERANCE and model.training
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]

    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert images.shape == ["batch", 3, f"{P}*rows", f"{P}*columns"]
    for shape in [(1, 3, 24, 20), (4, 3, 20, 48), (2, 3, 44, 24)]:  # other sizes than the export itself tries
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model.eval()(x)
        found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        torch.testing.assert_close(
            found, expected, rtol=0, atol=export.TOLERANCE * expected.abs().max().item()
        )


def test_program_and_metadata(tmp_path):
    """torch.export alone gives the same; the file carries the model's configuration."""
    model = build("peg(positions=(-1, 0, 1))", depth=2).eval()
    program = export.export_program(model)
    for shape in [(1, 3, 20, 24), (3, 3, 8, 40)]:
        x = torch.randn(shape)
        assert torch.equal(program.module()(x), model(x))
    export.export_onnx(model, tmp_path / "m.onnx")
    (kept,) = onnx.load(tmp_path / "m.onnx").metadata_props
    assert kept.key == "cpvt_config" and json.loads(kept.value)["encoding"] == model.config.encoding


def test_one_token_a_pixel_and_one_size(tmp_path):
    config = ModelConfig((6, 6), 1, 1, 4, 16, 1, 2, encoding="peg")
    assert export.export_onnx(VisionTransformer(config), tmp_path / "a.onnx").difference <= export.TOLERANCE

    model = build("learned(resize='refuse')")
    with pytest.raises(ConfigError, match=r"20x24 pixels only.*dynamic=False"):
        export.export_onnx(model, tmp_path / "b.onnx")
    with pytest.raises(ConfigError, match="24x24.*at 20x24 only"):
        export.export_onnx(model, tmp_path / "b.onnx", image_size=(24, 24), dynamic=False)
    report = export.export_onnx(model, tmp_path / "b.onnx", dynamic=False)
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 20, 24]
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(None, {"images": torch.zeros(1, 3, 24, 24).numpy()})


def test_refusals_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"image_size=\(20, 25\).*multiples of 4"):
        export.export_onnx(build("peg"), tmp_path / "m.onnx", image_size=(20, 25))
    with pytest.raises(ValueError, match=r"5 tokens on a side.*from 6 tokens \(24 pixels\)"):
        export.export_onnx(build("peg(kernel=5, padding='none', skip=False)"), tmp_path / "m.onnx")
    with pytest.raises(TypeError, match="Linear cannot be exported"):
        export.export_onnx(torch.nn.Linear(2, 2), tmp_path / "m.onnx")
    with pytest.raises(FileNotFoundError, match="no folder"):
        export.export_onnx(build("peg"), tmp_path / "nowhere" / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_is_never_written(tmp_path, monkeypatch):
    """The comparison is real: a PEG that computes something else in the export is caught, the old file kept."""
    (tmp_path / "m.onnx").write_text("as it was")
    right = PEG.forward

    def wrong(self, x, grid=None):
        out = right(self, x, grid)
        return out.tanh() if torch.compiler.is_exporting() else out

    monkeypatch.setattr(PEG, "forward", wrong)
    with pytest.raises(RuntimeError, match="differs from PyTorch by .* nothing was written"):
        export.export_onnx(build("peg(positions=(-1,))"), tmp_path / "m.onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.onnx", "as it was")]


def test_a_grid_baked_in_is_never_written(tmp_path, monkeypatch):
    """A reshape to the numbers of the example grid, the classic mistake, does not get past the export."""
    right = PEG.forward

    def baked(self, x, grid=None):
        return right(self, x, (3, 4)) if torch.compiler.is_exporting() else right(self, x, grid)

    monkeypatch.setattr(PEG, "forward", baked)
    with pytest.raises(RuntimeError, match="does not run at"):
        export.export_onnx(build("peg(positions=(-1,))"), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
