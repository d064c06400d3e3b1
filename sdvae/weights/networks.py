"""Which other network a file without a KL-VAE holds, by the names of its tensors."""

import re
from collections.abc import Collection

# What a network is called, and a name that only its files have; the first that is found.
_NETWORKS = (
    ("a LoRA", r"\.lora_(down|up|A|B)\b|^lora_|\.(hada|lokr)_w\d"),
    ("a ControlNet", r"^(control_model|controlnet_cond_embedding|input_hint_block)\."),
    ("a textual inversion", r"^(emb_params|string_to_param|clip_[lg])$"),
    ("a diffusion transformer", r"(^|\.)(joint|double|single_transformer|transformer)_blocks\.\d+\."),
    ("a UNet", r"(^|\.)(time_embed\.0|time_embedding\.linear_1)\."),
    ("a text encoder", r"(^|\.)(text_model\.encoder|transformer\.resblocks|encoder\.block\.\d+\.layer)\."),
    ("a language model", r"^(model\.)?layers\.\d+\.self_attn\."),
    ("an image encoder", r"(^|\.)vision_model\.encoder\."),
    ("a VQ-VAE", r"(^|\.)quantize\.embedding\b"),
    ("a video VAE", r"^(encoder|decoder)\.(conv_in\.conv|conv1|downsamples\.\d+|upsamples\.\d+)\."),
)


def find_network(keys: Collection[str]) -> str | None:
    """The network that these are the keys of, with its article; None where no name tells.

    A transformer's blocks have the same name inside a UNet: there are time embeddings beside them.
    """
    found = {name for name, pattern in _NETWORKS if any(re.search(pattern, key) for key in keys)}
    if "a UNet" in found:
        found -= {"a diffusion transformer", "a text encoder"}
    return next((name for name, _ in _NETWORKS if name in found), None)
