"""The decoding stage: latents to uint8 images."""
