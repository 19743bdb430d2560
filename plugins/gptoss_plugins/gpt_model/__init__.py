"""GPT-OSS as a megatron-core GPTModel that runs on CPUs and GPUs, without Transformer Engine."""
