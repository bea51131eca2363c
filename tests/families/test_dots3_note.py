"""What published files of dots 3 note say in other words than transformers saves."""

from ane_moe.checkpoints.checkpoint import open_checkpoint
from ane_moe.families import describe
from ane_moe.families.dots3_note import SIZES
from tests.models import make_model, read_config, save_checkpoint, write_config


def test_published_files_name_what_windows_have_by_themselves(tmp_path):
    checkpoint = save_checkpoint(make_model("dots3_note"), tmp_path)
    saved, config = describe(open_checkpoint(checkpoint))[0], read_config(checkpoint)
    text = config.pop("text_config")
    own = text.pop("per_layer_config")["1"]
    tables = text.pop("rope_parameters")
    text |= {f"swa_{name}": own[name] for name in SIZES}
    text |= {"rope_theta": tables["indexed_attention"]["rope_theta"]}
    text |= {"swa_rope_theta": tables["sliding_attention"]["rope_theta"]}
    text |= {"layer_types": ["full_attention", "sliding_attention"], "first_k_dense_replace": 1}
    text["sliding_window_size"] = text.pop("sliding_window")
    text["moe_shared_expert_intermediate_size"] = text.pop("shared_experts_intermediate_size")
    del text["mlp_layer_types"]
    write_config(checkpoint, text | config)
    assert describe(open_checkpoint(checkpoint))[0] == saved
