import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from sdvae.config import VAEConfig
from sdvae.model import AutoencoderKL
from sdvae.vae import VAE

# Its scripts import each other as `common`, and tests import them as `benchmarks.memory`.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

# A busy machine is slow, not wrong; and CI tries the same examples every time.
settings.register_profile("sdvae", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("sdvae")

# Where no GPU runs Triton's kernels its interpreter does; that is settled when anything imports Triton first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SMALL = VAEConfig(
    block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4,
    mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real photos, odd files and TAESD weights; not part of the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SDVAE_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set SDVAE_TEST_DATA to its folder")
    return folder


def random_model(config: VAEConfig, seed: int = 0) -> AutoencoderKL:
    """Seeded weights whose norms and biases are far from trivial, so that a wrong eps or padding shows."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoencoderKL(config).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_weight = "norm" in name and name.endswith("weight")
        if is_norm_weight:
            values = 1.0 + 0.3 * noise
        elif parameter.dim() == 1:
            values = 0.2 * noise
        else:
            values = noise * parameter[0].numel() ** -0.5
        parameter.data.copy_(values)
    if model.bn is not None:
        mean, variance = torch.randn(2, model.bn.num_features, generator=generator)
        model.bn.running_mean, model.bn.running_var = 0.5 * mean, 0.5 + variance.square()
        model.config = config.with_batch_norm(mean.mul(0.5).tolist(), (0.5 + variance.square()).tolist())
    return model


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random inputs are the same in every run, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_vae() -> VAE:
    return VAE(random_model(SMALL), torch.device("cpu"), torch.float32, name="small random VAE")
