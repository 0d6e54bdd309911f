"""Copies between host and device that wait for nothing that runs on the device."""

import torch


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device."""
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a device's tensor to the host; it is there once an event recorded behind this is."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Return an event behind everything given to a device; None on the CPU, which never lags."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
