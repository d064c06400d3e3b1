"""Networks that judge pictures, LPIPS' and FID's: their layers here, their weights from files that others publish."""
