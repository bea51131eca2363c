"""Adapters as peft writes them, of the tests' models: what is converted, and what it is held to."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapt(model: PreTrainedModel, folder: Path, seed: int = 0, **settings: Any) -> PeftModel:
    """Put a random adapter on `model`, strong enough to be seen, and save it."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS} | settings
    config = LoraConfig(init_lora_weights=False, **settings)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted.eval()
