"""Tiny random transformers models of many architectures, a few thousand parameters each."""

import torch
import transformers as hf

_COMMON = {"vocab_size": 32, "max_position_embeddings": 64}
_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    **_COMMON,
}
_BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    **_COMMON,
}

# name: model class, config, dotted name of its blocks
_MODELS = {
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**_LLAMA), "model.layers"),
    "mistral": lambda: (hf.MistralForCausalLM, hf.MistralConfig(sliding_window=4, **_LLAMA), "model.layers"),
    "qwen2": lambda: (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(use_sliding_window=True, sliding_window=4, max_window_layers=1, **_LLAMA),
        "model.layers",
    ),
    "qwen3": lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_LLAMA), "model.layers"),
    "gemma2": lambda: (hf.Gemma2ForCausalLM, hf.Gemma2Config(sliding_window=4, **_LLAMA), "model.layers"),
    "gemma3": lambda: (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(sliding_window=4, sliding_window_pattern=2, **_LLAMA),
        "model.layers",
    ),
    "phi": lambda: (hf.PhiForCausalLM, hf.PhiConfig(**{**_LLAMA, "num_key_value_heads": 2}), "model.layers"),
    "phi3": lambda: (
        hf.Phi3ForCausalLM,
        hf.Phi3Config(sliding_window=4, bos_token_id=1, eos_token_id=2, **_LLAMA),
        "model.layers",
    ),
    "gpt2": lambda: (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=3, n_head=2),
        "transformer.h",
    ),
    "gpt_neox": lambda: (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_BERT), "gpt_neox.layers"),
    "opt": lambda: (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=16, **_COMMON
        ),
        "model.decoder.layers",
    ),
    "falcon": lambda: (
        hf.FalconForCausalLM,
        hf.FalconConfig(hidden_size=16, ffn_hidden_size=24, num_hidden_layers=3, num_attention_heads=2, **_COMMON),
        "transformer.h",
    ),
    "bloom": lambda: (
        hf.BloomForCausalLM,
        hf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=3, n_head=2),
        "transformer.h",
    ),
    "mixtral": lambda: (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **_LLAMA),
        "model.layers",
    ),
    "qwen2_moe": lambda: (
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
            **_LLAMA,
        ),
        "model.layers",
    ),
    "qwen3_moe": lambda: (
        hf.Qwen3MoeForCausalLM,
        # a dense block between two of experts
        hf.Qwen3MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[1], **_LLAMA
        ),
        "model.layers",
    ),
    # experts with biases, stored as (in, out), with the outputs of gate and up interleaved
    "gpt_oss": lambda: (
        hf.GptOssForCausalLM,
        hf.GptOssConfig(
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **_LLAMA,
        ),
        "model.layers",
    ),
    # groups of experts, a router bias, and a shared expert that all tokens reach
    "deepseek_v3": lambda: (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            moe_intermediate_size=12,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            **{**_LLAMA, "num_key_value_heads": 2, "head_dim": 4},
        ),
        "model.layers",
    ),
    "bert": lambda: (hf.BertForMaskedLM, hf.BertConfig(**_BERT), "bert.encoder.layer"),
    "roberta": lambda: (hf.RobertaForMaskedLM, hf.RobertaConfig(**_BERT), "roberta.encoder.layer"),
    "mpnet": lambda: (hf.MPNetForMaskedLM, hf.MPNetConfig(**_BERT), "mpnet.encoder.layer"),
    "modernbert": lambda: (
        hf.ModernBertForMaskedLM,
        # one layer in three attends globally, the others to two neighbours on each side
        hf.ModernBertConfig(local_attention=4, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **_BERT),
        "model.layers",
    ),
    # blocks of two classes, whose state-space parameters are matrices outside of Linears
    "jamba": lambda: (
        hf.JambaForCausalLM,
        hf.JambaConfig(
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
            mamba_d_state=4,
            mamba_d_conv=2,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
            **{key: value for key, value in _LLAMA.items() if key not in ("head_dim", "num_hidden_layers")},
        ),
        "model.layers",
    ),
    "mamba": lambda: (
        hf.MambaForCausalLM,
        hf.MambaConfig(
            vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=3, time_step_rank=4, conv_kernel=2
        ),
        "backbone.layers",
    ),
    "t5": lambda: (
        hf.T5EncoderModel,
        hf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2),
        "encoder.block",
    ),
}
ARCHITECTURES = tuple(_MODELS)
# modules that keep matrices outside Linear layers and experts and so cannot be pruned
EXCLUDED = {"jamba": ("mamba.A_log", "mamba.dt_proj"), "mamba": ("mixer.A_log", "mixer.dt_proj")}
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba")


def build(name):
    """A model in evaluation mode and the dotted name of its blocks."""
    cls, config, blocks = _MODELS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config).eval()
        with torch.no_grad():
            # the usual initialisation is so small that blocks hardly do anything
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(8)
            # biases of experts and routers are zero at first
            for tensor_name, tensor in model.state_dict().items():
                if tensor_name.endswith(("_proj_bias", "router.bias", "correction_bias")):
                    tensor.normal_(std=0.1)
    return model, blocks


def token_batches(num=4, rows=1, length=10, seed=0):
    """Batches of random tokens without padding; 0 to 2 are special in some models."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 32, (num, rows, length), generator=generator)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def pad(batch, num_padded, side="right"):
    """The same batch with padding added."""
    zeros = torch.zeros(len(batch["input_ids"]), num_padded, dtype=torch.long)
    order = (lambda a, b: (a, b)) if side == "right" else (lambda a, b: (b, a))
    return {
        "input_ids": torch.cat(order(batch["input_ids"], zeros + 1), 1),
        "attention_mask": torch.cat(order(batch["attention_mask"], zeros), 1),
    }
