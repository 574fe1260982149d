"""The GPU decodes as the CPU does, up to the bounds stated here, and harms nothing that is still in use."""

import pytest
import torch
from encoded import PLAIN, RGB, Folder, encoded, exif, picture

from cpvt.data.decode import Decoder, Reader, decode_cpu

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@gpu
@pytest.mark.parametrize("kind", [*PLAIN, "mixed"])
def test_gpu_and_cpu_differ_by_rounding_and_chroma(kind, capsys):
    """The bound: 4 grey levels in the mean over an image, and 1 where no chroma is resampled."""
    sizes = [(45, 61), (375, 500), (333, 500), (1, 1), (17, 16), (640, 480)]
    options = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
    images = [
        encoded(
            picture(*size, mode="L" if name == "4:0:0" else "RGB", seed=n), subsampling=options.get(name, 0)
        )
        for name in ([*PLAIN] if kind == "mixed" else [kind])
        for n, size in enumerate(sizes)
    ]
    source = Folder(*images)
    fetched = Reader(source, True)[range(len(images))]
    assert all(span[4] for span in fetched.spans)
    decoded = Decoder("cuda")(fetched, source)
    assert not decoded.faults
    worst, mean = 0, 0.0
    for image, data in zip(decoded.images, images, strict=True):
        assert image.is_cuda and image.is_contiguous()
        apart = (image.cpu().int() - decode_cpu(data).int()).abs()
        worst, mean = max(worst, apart.max().item()), max(mean, apart.float().mean().item())
    with capsys.disabled():
        print(
            f"\nGPU and CPU, {kind}: at most {worst} and in the mean {mean:.3f} grey levels apart,", end=" "
        )
        print(f"{decoded.refused} of {len(images)} refused by the GPU")
    assert mean <= (1 if kind in ("4:4:4", "4:0:0") else 4)
    assert kind not in ("4:4:4", "4:0:0") or worst <= 4


@gpu
def test_exif_is_ignored_on_the_gpu():
    source = Folder(*[encoded(RGB, exif=exif(orientation)) for orientation in range(1, 9)])
    decoded = Decoder("cuda")(Reader(source, True)[range(8)], source)
    assert decoded.refused == 0
    assert all(torch.equal(image, decoded.images[0]) for image in decoded.images)
    assert decoded.images[0].shape == (3, 45, 61)


@gpu
@pytest.mark.parametrize("repeat", range(20))
def test_decoding_ahead_spares_what_queued_kernels_still_read(repeat):
    """Blocks freed while kernels that read them wait in the queue are not written by the next decode."""
    source = Folder(*[encoded(picture(375, 500, seed=i)) for i in range(32)])
    fetched, decoder = Reader(source, True)[range(32)], Decoder("cuda")
    want = [int(image.long().sum()) for image in decoder(fetched, source).images]
    other = Folder(*[encoded(picture(375, 500, seed=100 + i)) for i in range(32)])
    ahead = Reader(other, True)[range(32)]
    for on_own_stream in (False, True):
        with torch.cuda.stream(decoder.stream if on_own_stream else torch.cuda.current_stream()):
            images = decoder(fetched, source).images
            torch.cuda._sleep(200_000_000)  # about 0.1 s in which the sums below wait
            sums = [image.long().sum() for image in images]
            del images
            decoder(ahead, other)
            assert [int(s) for s in sums] == want
