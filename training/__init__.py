"""PyTorch ODISE: the model, its checkpoints, data, losses, trainer and evaluation."""

from training.torch_compat import declare_missing_torchvision_operators

declare_missing_torchvision_operators()
