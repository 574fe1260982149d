"""Export with open height and width: torch.export, and ONNX as onnxruntime runs it."""

import onnxruntime
import pytest
import torch
from torch.export import Dim

from cpvt import create_model


@pytest.mark.parametrize("encoding", ["peg", "learned", pytest.param("relative", marks=pytest.mark.slow)])
def test_one_file_takes_every_size(encoding, tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": (64, 64), "depth": 1, "width": 32, "heads": 2, "num_classes": 5}
    model = create_model("deit_tiny", encoding=encoding, **sizes).eval().requires_grad_(False)
    rows, columns = Dim("rows", min=2), Dim("columns", min=2)
    open_sizes = {0: Dim("batch"), 2: 16 * rows, 3: 16 * columns}
    program = torch.export.export(model, (torch.randn(2, 3, 48, 80),), dynamic_shapes=(open_sizes,))
    torch.onnx.export(program, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((2, 3, 64, 64), (1, 3, 32, 96), (3, 3, 160, 48)):
        images = torch.randn(shape)
        expected = model(images)
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-5, atol=1e-5)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
