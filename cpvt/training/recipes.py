"""Recipes by name: the configuration of a whole run, and what was published for it.

Each is a function of the model's name. Options on the command line change single fields of it.
"""

from collections.abc import Callable

from cpvt.config import AugmentConfig, DataConfig, DistillConfig, OptimConfig, RunConfig, TrainConfig, replace
from cpvt.model.zoo import model_config

_MIX = {"mixup": 0.8, "cutmix": 1.0, "mix_group": 128}
_SINGLE = {"crop": True, "hflip": 0.5, "randaugment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}
DEIT_AUGMENT = AugmentConfig(**_SINGLE, **_MIX, repeated_aug=3)


def plain(model: str) -> TrainConfig:
    """A short run without augmentation, for the synthetic tasks and small data."""
    return TrainConfig(model=model_config(model))


def deit(model: str) -> TrainConfig:
    """300 epochs of ImageNet as in DeiT and CPVT (Touvron et al. 2021, Chu et al. 2021).

        cpvt train --recipe deit --model cpvt_tiny_5peg --data PATH --run.out runs/cpvt_tiny_5peg

    Published for this recipe: CPVT-Ti 73.4 (five PEGs), 72.4 (one); DeiT-tiny 72.2. The learning rate grows
    with the batch, so a smaller optim.global_batch_size needs no other change; one GPU takes micro-batches.
    """
    batch = {"global_batch_size": 2048, "micro_batch_size": 1024, "epochs": 300}
    rate = {"lr": 5e-4, "scale_lr": True, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5}
    rest = {"weight_decay": 0.05, "label_smoothing": 0.1, "clip_grad": 0.0, "ema_decay": 0.99996}
    return TrainConfig(
        model=model_config(model, drop_path=0.1),
        data=DataConfig(image_size=224, store="files", crop_pct=0.875),
        augment=DEIT_AUGMENT,
        optim=OptimConfig(**batch, **rate, **rest),
        run=RunConfig(precision="bf16", compile="model", log_every=100, evaluate_every=10),
    )


def deit_distilled(model: str) -> TrainConfig:
    """`deit`, taught by timm's regnety_160.deit_in1k through its best guess (hard distillation), as in DeiT.

    cpvt train --recipe deit-distilled --model deit_tiny_distilled --data PATH --distill.weights FILE
    """
    return replace(deit(model), distill=DistillConfig(teacher="regnety_160.deit_in1k"))


def deit_384(model: str) -> TrainConfig:
    """30 epochs at 384 pixels, from weights of 224, at a constant small learning rate.

    cpvt train --recipe deit-384 --model cpvt_tiny --data PATH --run.init runs/cpvt_tiny/model.safetensors
    """
    config = deit(model)
    constant = {"lr": 5e-6, "min_lr": 5e-6, "warmup_steps": 0, "weight_decay": 1e-8}
    batch = {"global_batch_size": 512, "micro_batch_size": 256}
    optim = OptimConfig(**batch, **constant, epochs=30, label_smoothing=0.1, clip_grad=0.0)
    model, data = replace(config.model, image_size=(384, 384)), replace(config.data, image_size=384)
    return replace(config, model=model, data=data, optim=optim)


RECIPES: dict[str, Callable[[str], TrainConfig]] = {"plain": plain, "deit": deit}
RECIPES |= {"deit-distilled": deit_distilled, "deit-384": deit_384}
