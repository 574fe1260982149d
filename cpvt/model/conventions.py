"""What timm expects of a model beside `forward`: features of inner blocks, pruning, groups of parameters.

Letters: B batch, N patches, P prefix tokens, D width, (H, W) grid of tokens.
"""

from __future__ import annotations

from torch import Tensor, nn


class TimmConventions:
    """Mixed into `VisionTransformer`, whose parts it calls."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Tokens after chosen blocks, encoding included: what the next block sees.

        `indices`: which blocks (negative from the end), or how many of the last ones; None is all.
        Gives (B, D, H, W) or, for output_fmt="NLC", (B, N, D); with prefixes, pairs (that, (B, P, D)).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}; expected 'NCHW' or 'NLC'")
        depth = len(self.blocks)
        if indices is None or isinstance(indices, int):
            indices = range(depth - (depth if indices is None else indices), depth)
        if any(not -depth <= i < depth for i in indices):
            raise ValueError(
                f"indices={list(indices)} in a model of {depth} blocks; expected -{depth} to {depth - 1}"
            )
        take = sorted(i % depth for i in indices)
        tokens, grid = self._tokens(x)
        keep = self.draw_keep(x.shape[0], x.device)
        found, P = [], self.num_prefix_tokens
        for i in range(max(take) + 1 if stop_early and take else depth):
            tokens, grid = self._block(i, tokens, grid, keep)
            if i in take:
                shown = self.norm(tokens) if norm else tokens
                patches, prefix = shown[:, P:], shown[:, :P]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                found.append((patches, prefix) if return_prefix_tokens and P else patches)
        return found if intermediates_only else (self.norm(tokens), found)

    def prune_intermediate_layers(
        self, indices=1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks behind the last one asked for; gives the indices kept. For feature extraction."""
        depth = len(self.blocks)
        take = (
            list(range(depth - indices, depth)) if isinstance(indices, int) else [i % depth for i in indices]
        )
        self.blocks = self.blocks[: max(take) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "dist_token"} | {f"encoding.{own}" for own in self.encoding.public_names}

    def group_matcher(self, coarse: bool = False) -> dict:
        return {
            "stem": r"^cls_token|^dist_token|^patch_embed|^encoding|^pos_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }
