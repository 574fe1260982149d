"""What the tests of the models share: every encoding, small models whose every weight matters, comparisons."""

import pytest
import torch
from encoded import refusal
from torch.func import functional_call

from cpvt import ModelConfig
from cpvt.errors import UserError
from cpvt.model.encodings import PEG
from cpvt.model.vit import VisionTransformer

RELATIVE = [f"relative(clip=2{more})" for more in ("", ", on='keys_values'", ", on='bias'", ", wrap=True")]
PEGS = ["positions=(-1,), kernel=27, compute='matrix'", "convolution='separable', init='twins'"]
PEGS += ["kernel=1, convolution='dense', bias=False", "padding='none', skip=False", "padding='replicate'"]
PEGS += ["padding='circular'", "positions=(-1, 0, 1), repeat=2", "frozen=True", "on='queries_keys'"]
ENCODINGS = ["none", "learned", "learned(antialias=True)", "sine", "sine(resize='rescale')", *RELATIVE]
ENCODINGS += ["rotary", "rotary(resize='rescale')", "peg", *(f"peg({options})" for options in PEGS)]
ENCODINGS += ["relative(clip=2) + peg + rotary"]
POOLS = {"token": {}, "avg": {"global_pool": "avg"}, "distilled": {"distilled": True}}
# Each encoding with one of the three; those that treat prefix tokens apart with all.
PAIRS = [(encoding, list(POOLS)[i % 3]) for i, encoding in enumerate(ENCODINGS)]
APART = [(e, p) for e in ("learned", "relative(clip=2)", "rotary", "peg") for p in POOLS]
PAIRS += [pair for pair in APART if pair not in PAIRS]
CHANGE, SAME = 1e-10, 1e-12  # relative differences: what is claimed to exceed, what rounding stays below


def small_model(encoding, grid, seed=0, **options) -> VisionTransformer:
    """One pixel a token."""
    torch.manual_seed(seed)
    sizes = {"image_size": grid, "patch_size": 1, "width": 16, "heads": 2, "depth": 4, "mlp_ratio": 2.0}
    return VisionTransformer(ModelConfig(**{**sizes, "num_classes": 7, "encoding": encoding, **options}))


def random_model(encoding, grid, seed=0, std=0.25, **options) -> VisionTransformer:
    """One pixel a token, in float64, every weight normal with deviation `std`."""
    model = small_model(encoding, grid, seed, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def random_images(n, grid, seed=1):
    return torch.randn(n, 3, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def set_fused(model, fused):
    """Computes every PEG by one operator where it is faster (None), wherever there is one (True), or never."""
    for module in model.modules():
        if isinstance(module, PEG):
            module.fused = fused


@torch.no_grad()
def logits(model, images):
    return model(images)


def assert_one_set_of_names(model, other, images):
    """The state's names are those of parameters and buffers, and by them one model computes as another does."""
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in model.state_dict() if name not in dict(model.named_buffers())] == names
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(functional_call(model, state, (images,)), other(images))


def difference(a, b) -> float:
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


def assert_refused(words, call, *args, error=UserError, **kwargs):
    """In one line that has these words."""
    message = refusal(call, *args, error=error, **kwargs)
    assert all(word in message for word in words), message
    return message


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
