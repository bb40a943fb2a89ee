"""The denoising stage: one step of the flow for every active image at a time."""
