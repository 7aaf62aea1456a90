"""A small, accurate SE-ResNet on CIFAR-10 and other sets of small images, trained fast from FFCV files.

    from seresnet import load
    net = load("runs/X")
    labels = net.predict(images)    # uint8 (N, H, W, 3) -> int64 (N,)
"""

__version__ = "0.1.0"


def load(path, device: str = "auto", precision: str = "auto"):
    """The trained net of a run folder, or of the checkpoint file named (seresnet.trained.TrainedNet)."""
    from seresnet.trained import load as load_net    # torch is loaded when it is needed
    return load_net(path, device, precision)
