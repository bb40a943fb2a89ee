"""Whether the image of `make demo` is the recorded one: the tiny checkpoint's weights and its seed are fixed."""

import sys

import numpy as np
from PIL import Image

# 8 x 8 pixels, one every 32, as red, green and blue. Recorded on a CPU with AVX-512 in float32.
RECORDED = bytes.fromhex(
    "7c985c798f9945ac7c7cbb6ec5ffe159876582a27a6bffc46e5f66577d6052c58d84c1925ddd876f8f8b88ff967b8b7e"
    "93ff5f868f625ee78938b58ba4f89269939c78835a69afbc85aa7090947754b3a284b16d668b74a599d834af8c56ffab"
    "72a17a28e493988d9078ae6d9dc84e75b38a80aa858e985882a3ad7baf5385a67251ddb494a6ab90a28fa5dbea5f788e"
    "6674662dd0d17da2864f89a083be51778d83b4818bcebdc9438c7f7abe515b7c4d44b7b4a0cc8c6ee0987fd381638b82"
)
STEP, FIRST = 32, 8
TOLERANCE = 16  # of 255; other CPUs round sums otherwise, and 25 steps let the difference grow


def main(path: str) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB"))[FIRST::STEP, FIRST::STEP]
    recorded = np.frombuffer(RECORDED, np.uint8).reshape(8, 8, 3)
    if pixels.shape != recorded.shape:
        print(f"check: {path} has not the size of the demo's image, 256x256", file=sys.stderr)
        return 1
    difference = int(np.abs(pixels.astype(int) - recorded).max())
    if difference > TOLERANCE:
        print(f"check: {path} is not the recorded image: a pixel differs by {difference} of 255", file=sys.stderr)
        return 1
    equal = "equals the recorded image" if difference == 0 else f"is the recorded image to within {difference} of 255"
    print(f"check: {path} {equal}, in 64 sampled pixels. It is noise, as the weights are random.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
