"""Networks, one file a family, and one registry."""

from .base import Network
from .registry import ModelInfo, create_model, list_models, model_info
from .resnet import CifarResNet, ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .weights import load_weights

__all__ = [
    "CifarResNet",
    "ModelInfo",
    "Network",
    "ResNet",
    "create_model",
    "list_models",
    "load_weights",
    "model_info",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
