"""A stock Wan transformer for the world of clips: words, a codec, and the chunk before in the channels.

    text      three tokens per chunk: scene, the picture that a clip starts with (first chunk alone), action
    channels  noisy latents | latents of the chunk before | 1 where that is known, as Wan's image-to-video models have
    output    the clean latents (x-prediction); the velocity follows, v = (x_t - x) / t

Three parts, each in a folder of its own: the transformer opens with `WanTransformer3DModel.from_pretrained`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_opt.datasets import read_json, write_json
from diffusion_opt.datasets.clips import ACTIONS, PICTURES, SCENES, clips
from diffusion_opt.models.causal.codec import TubeAutoencoder
from diffusion_opt.models.causal.layout import Layout
from diffusion_opt.models.causal.wan import CausalWan

MEMORY = "memory.json"  # window and sink of training
SMALLEST_TIME = 0.05  # below it a velocity from a clean prediction would divide by nearly 0
CODEC_SEED = 77


class ClipWords(ModelMixin, ConfigMixin):
    """Tables of words; the last row of each stands for "not said"."""

    @register_to_config
    def __init__(
        self,
        scenes: Sequence[str] = SCENES,
        pictures: Sequence[str] = PICTURES,
        actions: Sequence[str] = ACTIONS,
        dim: int = 64,
    ) -> None:
        super().__init__()
        self.scene_table, self.picture_table, self.action_table = (
            nn.Embedding(len(names) + 1, dim) for names in (scenes, pictures, actions)
        )

    def forward(
        self, scenes: Int[Tensor, " b"], pictures: Int[Tensor, " b"], actions: Int[Tensor, "b k"], first: bool = True
    ) -> Float[Tensor, "b k 3 d"]:
        """Tokens of each chunk; the picture is said of the first one, if that is the clip's `first`."""
        num_chunks, unsaid = actions.shape[1], len(self.config.pictures)
        said = torch.full_like(actions, unsaid)
        if first:
            said[:, 0] = pictures
        scene = self.scene_table(scenes)[:, None].expand(-1, num_chunks, -1)
        return torch.stack([scene, self.picture_table(said), self.action_table(actions)], 2)


class ClipModel(nn.Module):
    """See the module's head. `window` and `sink` are those of training, and so of use."""

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        words: ClipWords,
        codec: TubeAutoencoder,
        window: int = 6,
        sink: int = 1,
    ) -> None:
        super().__init__()
        channels = codec.config.latent_channels
        if (transformer.config.in_channels, transformer.config.out_channels) != (2 * channels + 1, channels):
            raise ValueError(
                f"latents of {channels} channels need a transformer of {2 * channels + 1} channels in and {channels} "
                f"out, got {transformer.config.in_channels} and {transformer.config.out_channels}"
            )
        if window < 1 or window + sink > transformer.config.rope_max_seq_len:
            raise ValueError(
                f"window and sink must fit the {transformer.config.rope_max_seq_len} positions of the transformer, "
                f"got {window} and {sink}"
            )
        self.transformer, self.words, self.codec = transformer, words, codec
        self.window, self.sink = window, sink
        self.causal = CausalWan(transformer, window, sink)
        self.stream_under_way: object | None = None

    @classmethod
    def build(
        cls, dim: int = 256, layers: int = 4, heads: int = 4, channels: int = 96, window: int = 6, sink: int = 1,
        patch: int = 1, seed: int = 0, codec_clips: int = 96,
    ) -> "ClipModel":  # fmt: skip
        """A new model whose blocks begin as identities, with a codec fitted to training clips.

        Raises ValueError for a width that is no multiple of twice the heads, and no layers.
        """
        if dim < 1 or dim % (2 * heads):
            raise ValueError(
                f"dim must be a multiple of {2 * heads}, which {heads} heads of even width need, got {dim}"
            )
        if layers < 1 or patch < 1:
            raise ValueError(f"layers and patch must be 1 or more, got {layers} and {patch}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = WanTransformer3DModel(
                patch_size=(1, patch, patch), num_attention_heads=heads, attention_head_dim=dim // heads,
                in_channels=2 * channels + 1, out_channels=channels, text_dim=64, freq_dim=64, ffn_dim=4 * dim,
                num_layers=layers, rope_max_seq_len=64,
            )  # fmt: skip
            words = ClipWords()
        embedder = transformer.condition_embedder
        quiet = [embedder.time_proj.weight, embedder.time_proj.bias, transformer.proj_out.weight]
        quiet += [transformer.proj_out.bias, transformer.scale_shift_table]
        for block in transformer.blocks:
            quiet += [block.scale_shift_table, block.attn2.to_out[0].weight]
        for parameter in quiet:
            nn.init.zeros_(parameter)
        codec = TubeAutoencoder(channels).fit(clips(codec_clips, 4, CODEC_SEED).frames)
        return cls(transformer, words, codec, window, sink)

    def channels(
        self, x: Float[Tensor, "*b c 1 h w"], before: Float[Tensor, "*b c 1 h w"], known: Float[Tensor, "*b"]
    ) -> Float[Tensor, "*b d 1 h w"]:
        """The transformer's input: noisy latents, the chunk before, and whether it is known."""
        mask = known[..., None, None, None, None].to(x.dtype).expand(*x.shape[:-4], 1, *x.shape[-3:])
        return torch.cat([x, before * mask, mask], -4)

    def forward(
        self,
        x_t: Float[Tensor, "b r c 1 h w"],
        t: Float[Tensor, "b r"],
        text: Float[Tensor, "b r 3 d"],
        before: Float[Tensor, "b r c 1 h w"],
        known: Float[Tensor, "b r"],
        layout: Layout,
    ) -> Float[Tensor, "b r c 1 h w"]:
        """The clean latents of each chunk."""
        return self.causal(self.channels(x_t, before, known), t, text, layout).float()

    def save(self, folder: Path) -> None:
        """Write the parts below a folder, as safetensors and JSON."""
        for name in ("transformer", "words", "codec"):
            getattr(self, name).save_pretrained(folder / name, safe_serialization=True)
        write_json(folder / MEMORY, {"window": self.window, "sink": self.sink})

    @classmethod
    def open(cls, folder: Path, window: int | None = None, sink: int | None = None) -> "ClipModel":
        """Read the parts; window and sink are those it was trained with unless others are given.

        Raises FileNotFoundError if one is not there."""
        kinds = {"transformer": WanTransformer3DModel, "words": ClipWords, "codec": TubeAutoencoder}
        for name in kinds:
            if not (folder / name / "config.json").is_file():
                raise FileNotFoundError(f"{folder / name} is no part of a model of clips; save one with ClipModel.save")
        parts = {name: kind.from_pretrained(folder / name, use_safetensors=True) for name, kind in kinds.items()}
        memory = read_json(folder / MEMORY, "save the model again with ClipModel.save")
        window, sink = (
            memory[name] if given is None else given for name, given in (("window", window), ("sink", sink))
        )
        return cls(**parts, window=window, sink=sink)
