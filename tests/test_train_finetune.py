"""The embedded VAE's decoder, damaged and fine-tuned: twenty minutes of one core bring it back."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from sdvae.encoding.manifest import fixed_threads
from sdvae.images.read import read_image
from sdvae.metrics import psnr
from sdvae.pixels import to_images, to_pixels
from sdvae.train.config import load_config
from sdvae.train.loop import train
from sdvae.vae import VAE

NUM_STEPS = int(os.environ.get("SDVAE_FINETUNE_STEPS", "600"))  # 20 minutes of one core
DAMAGE = 0.25  # of noise, as a share of each weight tensor's deviation


def kodak_psnr(vae: VAE, data_dir: Path) -> float:
    """Mean over the 24 photos, centre 256 crops, in dB."""
    values = []
    for path in sorted((data_dir / "kodak").glob("*.png")):
        image = np.ascontiguousarray(read_image(path)[128:384, 128:384])
        decoded = to_images(vae.decode(vae.encode(to_pixels(image[None])).mode()))[0]
        values.append(psnr(decoded, image))
    assert len(values) == 24
    return sum(values) / len(values)


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_a_damaged_decoder_comes_back(data_dir: Path, tmp_path: Path) -> None:
    with fixed_threads(1):
        vae = VAE.load(device="cpu", dtype="fp32")
        sound = kodak_psnr(vae, data_dir)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in vae.model.decoder.parameters():
                if parameter.dim() > 1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += DAMAGE * float(parameter.std()) * noise
            vae.model.decoder.conv_out.reset_parameters()  # its last layer is lost altogether
        vae.save(tmp_path / "damaged")
        damaged = VAE.load(tmp_path / "damaged", device="cpu", dtype="fp32")
        before = kodak_psnr(damaged, data_dir)
        print(f"sound {sound:.2f} dB, damaged {before:.2f} dB")
        assert before <= sound - 6.0

        config = load_config("finetune_decoder", [
            f"model.start={tmp_path / 'damaged'}", f"data.source={data_dir / 'train'}", f"steps={NUM_STEPS}",
            "data.ladder=[{size_px=96, batch_size=4}]", "data.workers=1", "precision=fp32", "loss.gradient=0",
            "optimizer.learning_rate=1e-3", "optimizer.warmup_steps=20", "optimizer.ema=0.99",
            "output.validate_every=200", "output.save_every=200",
        ])  # fmt: skip
        report = train(config, tmp_path / "run", "cpu")
        after = VAE.load(tmp_path / "run", device="cpu", dtype="fp32")
        restored = kodak_psnr(after, data_dir)
    print(f"restored {restored:.2f} dB, {report.steps_per_s:.2f} steps/s, waiting {report.waiting:.1%}")
    assert restored >= sound - 0.3
    weights, kept = after.model.state_dict(), damaged.model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in kept.items() if key.startswith("encoder."))
    theirs = AutoencoderKL.from_pretrained(tmp_path / "run")
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    ours = after.decode(after.encode(pixels).mode())
    torch.testing.assert_close(theirs(pixels).sample, ours, rtol=1e-3, atol=1e-3)
