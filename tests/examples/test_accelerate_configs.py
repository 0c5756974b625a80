"""The launch configurations are what `accelerate launch` reads, and name what the model has."""

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from example_cases import REPOSITORY

from blossomrec_hf import BlossomRecForSequentialRecommendation


FOLDER = REPOSITORY / "examples" / "accelerate"


@pytest.mark.parametrize(("name", "kind"), [("ddp.yaml", "MULTI_GPU"), ("fsdp2.yaml", "FSDP")])
def test_accelerate_reads_them(name, kind):
    config = ClusterConfig.from_yaml_file(yaml_file=FOLDER / name)
    assert config.distributed_type.name == kind
    assert (config.num_machines, config.use_cpu, config.mixed_precision) == (1, False, "bf16")
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert [wrapped] == list(BlossomRecForSequentialRecommendation._no_split_modules)
