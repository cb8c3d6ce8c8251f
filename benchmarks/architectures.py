"""Tiny random-weight configurations of `transformers` architectures, one function of a dict each.

A row is (class prefix, head, configuration keys, inputs). All are small enough to be captured in a
second or two; every head is one behind which the residual stream is free to shrink.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = dict[str, Tensor]
Row: TypeAlias = tuple[str, str, dict[str, Any], Callable[[], Inputs]]

VOCABULARY = 60
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**TINY, "num_key_value_heads": 2}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
VISION: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 5,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 3, "classifier_proj_size": 24, "num_labels": 5, "pad_token_id": 0,
}  # fmt: skip


def ids(length: int = 12) -> Callable[[], Inputs]:
    return lambda: {"input_ids": torch.randint(3, VOCABULARY, (2, length))}


def pair(length: int = 12) -> Callable[[], Inputs]:
    return lambda: {
        "input_ids": torch.randint(3, VOCABULARY, (2, length)),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7)),
    }


def image(size: int = 32) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def wave(length: int = 800) -> Callable[[], Inputs]:
    return lambda: {"input_values": torch.randn(2, length)}


def spectrum(name: str, *shape: int) -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(2, *shape)}


def spoken() -> Inputs:
    return {
        "input_features": torch.randn(2, 20, 40),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7)),
    }


CLASSIFY, CAUSAL, IMAGES = "ForSequenceClassification", "ForCausalLM", "ForImageClassification"
GENERATE, MASKED = "ForConditionalGeneration", "ForMaskedLM"

ENCODERS: dict[str, Row] = {
    "bert": ("Bert", CLASSIFY, TINY, ids()),
    "bert_mlm": ("Bert", MASKED, TINY, ids()),
    "roberta": ("Roberta", CLASSIFY, TINY, ids()),
    "distilbert": ("DistilBert", CLASSIFY, {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2,
                   "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 32}, ids()),
    "albert": ("Albert", CLASSIFY, {**TINY, "embedding_size": 24}, ids()),
    "electra": ("Electra", CLASSIFY, {**TINY, "embedding_size": 24}, ids()),
    "mpnet": ("MPNet", CLASSIFY, {**TINY, "pad_token_id": 1, "bos_token_id": 0}, ids()),
    "deberta_v2": ("DebertaV2", CLASSIFY, {**TINY, "relative_attention": True,
                   "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
                   "norm_rel_ebd": "layer_norm", "position_biased_input": False}, ids()),
    "convbert": ("ConvBert", CLASSIFY, {**TINY, "embedding_size": 24, "head_ratio": 2,
                 "conv_kernel_size": 3}, ids()),
    "mobilebert": ("MobileBert", CLASSIFY, {**TINY, "embedding_size": 16,
                   "intra_bottleneck_size": 16, "num_feedforward_networks": 2}, ids()),
    "squeezebert": ("SqueezeBert", CLASSIFY, {**TINY, "embedding_size": 32, "q_groups": 2,
                    "k_groups": 2, "v_groups": 2, "intermediate_groups": 2,
                    "output_groups": 2}, ids()),
    "roformer": ("RoFormer", CLASSIFY, {**TINY, "embedding_size": 32}, ids()),
    "layoutlm": ("LayoutLM", CLASSIFY, {**TINY, "max_2d_position_embeddings": 16}, ids()),
    "modernbert": ("ModernBert", CLASSIFY, {**TINY, "global_attn_every_n_layers": 2,
                   "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}, ids()),
    "fnet": ("FNet", CLASSIFY, {**TINY, "use_tpu_fourier_optimizations": False}, ids()),
    "xlm": ("XLM", CLASSIFY, {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2,
            "n_heads": 4, "max_position_embeddings": 32, "n_langs": 1, "pad_index": 0}, ids()),
    "nystromformer": ("Nystromformer", CLASSIFY, {**TINY, "num_landmarks": 12,
                      "segment_means_seq_len": 12, "conv_kernel_size": 3}, ids()),
    "xlnet": ("XLNet", CLASSIFY, {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2,
              "n_head": 4, "d_inner": 48, "mem_len": None, "use_mems_eval": False}, ids()),
    "rembert": ("RemBert", CLASSIFY, {**TINY, "input_embedding_size": 24}, ids()),
    "ernie": ("Ernie", CLASSIFY, TINY, ids()),
    "megatron_bert": ("MegatronBert", CLASSIFY, TINY, ids()),
}  # fmt: skip
DECODERS: dict[str, Row] = {
    "gpt2": ("GPT2", "LMHeadModel", GPT, ids()),
    "gpt_neo": ("GPTNeo", CAUSAL, {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2,
                "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4,
                "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}, ids()),
    "gpt_neox": ("GPTNeoX", CAUSAL, {**TINY, "rotary_pct": 0.5}, ids()),
    "gptj": ("GPTJ", CAUSAL, {**GPT, "rotary_dim": 4}, ids()),
    "codegen": ("CodeGen", CAUSAL, {**GPT, "rotary_dim": 4}, ids()),
    "opt": ("OPT", CAUSAL, {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 24}, ids()),
    "bloom": ("Bloom", CAUSAL, {**TINY, "n_head": 4, "n_layer": 2}, ids()),
    "mpt": ("Mpt", CAUSAL, {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4,
            "max_seq_len": 32, "expansion_ratio": 2}, ids()),
    "falcon": ("Falcon", CAUSAL, {**TINY, "new_decoder_architecture": True, "num_kv_heads": 2,
               "alibi": False, "bias": False, "parallel_attn": True}, ids()),
    "llama": ("Llama", CAUSAL, GROUPED, ids()),
    "mistral": ("Mistral", CAUSAL, {**GROUPED, "head_dim": 8, "sliding_window": 6}, ids()),
    "qwen2": ("Qwen2", CAUSAL, GROUPED, ids()),
    "qwen3": ("Qwen3", CAUSAL, {**GROUPED, "head_dim": 16}, ids()),
    "phi": ("Phi", CAUSAL, {**TINY, "partial_rotary_factor": 0.5}, ids()),
    "phi3": ("Phi3", CAUSAL, GROUPED, ids()),
    "gemma2": ("Gemma2", CAUSAL, {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8,
               "sliding_window": 6}, ids()),
    "gemma3": ("Gemma3Text|Gemma3", CAUSAL, {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8,
               "sliding_window": 6}, ids()),
    "stablelm": ("StableLm", CAUSAL, {**GROUPED, "partial_rotary_factor": 0.5}, ids()),
    "starcoder2": ("Starcoder2", CAUSAL, GROUPED, ids()),
    "olmo2": ("Olmo2", CAUSAL, GROUPED, ids()),
    "cohere": ("Cohere", CAUSAL, {**GROUPED, "use_qk_norm": True}, ids()),
    "granite": ("Granite", CAUSAL, GROUPED, ids()),
    "glm": ("Glm", CAUSAL, {**GROUPED, "head_dim": 8, "partial_rotary_factor": 0.5}, ids()),
    "olmo": ("Olmo", CAUSAL, GROUPED, ids()),
    "smollm3": ("SmolLM3", CAUSAL, GROUPED, ids()),
    "nemotron": ("Nemotron", CAUSAL, {**GROUPED, "partial_rotary_factor": 0.5}, ids()),
    "persimmon": ("Persimmon", CAUSAL, {**TINY, "partial_rotary_factor": 0.5}, ids()),
    "mixtral": ("Mixtral", CAUSAL, {**GROUPED, "num_local_experts": 4}, ids()),
    "gpt_oss": ("GptOss", CAUSAL, {**GROUPED, "head_dim": 8, "num_local_experts": 4,
                "num_experts_per_tok": 2, "sliding_window": 6}, ids()),
    "mamba": ("Mamba", CAUSAL, {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8,
              "num_hidden_layers": 2, "time_step_rank": 4}, ids(6)),
    "biogpt": ("BioGpt", CAUSAL, TINY, ids()),
    "xglm": ("XGLM", CAUSAL, {"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2,
             "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 32}, ids()),
}  # fmt: skip
PAIRS: dict[str, Row] = {
    "t5": ("T5", GENERATE, {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48,
           "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
           "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, pair()),
    "t5_encoder": ("T5", "ForTokenClassification", {"vocab_size": VOCABULARY, "d_model": 32,
                   "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                   "relative_attention_num_buckets": 8}, ids()),
    "bart": ("Bart", GENERATE, SEQ2SEQ, pair()),
    "marian": ("Marian", "MTModel", SEQ2SEQ, pair()),
    "pegasus": ("Pegasus", GENERATE, SEQ2SEQ, pair()),
    "mbart": ("MBart", GENERATE, SEQ2SEQ, pair()),
    "blenderbot": ("Blenderbot", GENERATE, SEQ2SEQ, pair()),
    "umt5": ("UMT5", GENERATE, {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48,
             "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
             "tie_word_embeddings": False}, pair()),
    "speech_to_text": ("Speech2Text", GENERATE, {**SEQ2SEQ, "input_feat_per_channel": 20,
                       "conv_channels": 24, "max_source_positions": 40,
                       "max_target_positions": 32},
                       lambda: {"input_features": torch.randn(2, 40, 20),
                                "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7))}),
    "whisper": ("Whisper", GENERATE, {**SEQ2SEQ, "num_mel_bins": 20, "max_source_positions": 20,
                "max_target_positions": 16, "suppress_tokens": None,
                "begin_suppress_tokens": None}, spoken),
}  # fmt: skip
IMAGE_MODELS: dict[str, Row] = {
    "vit": ("ViT", IMAGES, VISION, image()),
    "deit": ("DeiT", IMAGES, VISION, image()),
    "beit": ("Beit", IMAGES, {**VISION, "use_relative_position_bias": True}, image()),
    "dinov2": ("Dinov2", IMAGES, {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": True}, image()),
    "swin": ("Swin", IMAGES, {"image_size": 32, "patch_size": 2, "embed_dim": 16,
             "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "num_labels": 5}, image()),
    "swinv2": ("Swinv2", IMAGES, {"image_size": 32, "patch_size": 2, "embed_dim": 16,
               "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
               "num_labels": 5}, image()),
    "convnext": ("ConvNext", IMAGES, {"num_stages": 2, "hidden_sizes": [12, 20],
                 "depths": [1, 1], "num_labels": 5}, image()),
    "convnextv2": ("ConvNextV2", IMAGES, {"num_stages": 2, "hidden_sizes": [12, 20],
                   "depths": [1, 1], "num_labels": 5}, image()),
    "resnet": ("ResNet", IMAGES, {"embedding_size": 12, "hidden_sizes": [16, 24],
               "depths": [1, 2], "layer_type": "bottleneck", "num_labels": 5}, image()),
    "regnet": ("RegNet", IMAGES, {"embedding_size": 12, "hidden_sizes": [16, 24],
               "depths": [1, 2], "groups_width": 8, "num_labels": 5}, image()),
    "mobilenet_v1": ("MobileNetV1", IMAGES, {"depth_multiplier": 0.25, "min_depth": 8,
                     "num_labels": 5}, image()),
    "mobilenet_v2": ("MobileNetV2", IMAGES, {"depth_multiplier": 0.25, "num_labels": 5}, image()),
    "efficientnet": ("EfficientNet", IMAGES, {"width_coefficient": 0.25,
                     "depth_coefficient": 0.3, "hidden_dim": 320, "image_size": 32,
                     "num_labels": 5}, image()),
    "bit": ("Bit", IMAGES, {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
            "num_groups": 4, "num_labels": 5}, image()),
    "segformer": ("Segformer", IMAGES, {"num_encoder_blocks": 2, "depths": [1, 1],
                  "sr_ratios": [2, 1], "hidden_sizes": [16, 24], "num_attention_heads": [2, 4],
                  "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
                  "num_labels": 5}, image()),
    "segformer_masks": ("Segformer", "ForSemanticSegmentation", {"num_encoder_blocks": 2,
                        "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 24],
                        "num_attention_heads": [2, 4], "patch_sizes": [7, 3], "strides": [4, 2],
                        "mlp_ratios": [2, 2], "decoder_hidden_size": 20,
                        "num_labels": 5}, image()),
    "poolformer": ("PoolFormer", IMAGES, {"num_encoder_blocks": 2, "depths": [1, 1],
                   "hidden_sizes": [12, 20], "patch_sizes": [7, 3], "strides": [4, 2],
                   "padding": [2, 1], "num_labels": 5}, image()),
    "mobilevit": ("MobileViT", IMAGES, {"image_size": 32, "hidden_sizes": [16, 20, 24],
                  "neck_hidden_sizes": [8, 8, 12, 16, 16, 20, 24], "num_attention_heads": 4,
                  "mlp_ratio": 2.0, "num_labels": 5}, image(64)),
    "pvt": ("Pvt", IMAGES, {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1], "hidden_sizes": [16, 24],
            "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2], "num_labels": 5}, image()),
    "cvt": ("Cvt", IMAGES, {"patch_sizes": [7, 3], "patch_stride": [4, 2],
            "patch_padding": [2, 1], "embed_dim": [16, 24], "num_heads": [2, 4],
            "depth": [1, 2], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0],
            "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0, 0.0], "qkv_bias": [True, True],
            "cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"],
            "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2],
            "padding_q": [1, 1], "stride_q": [1, 1], "num_labels": 5}, image()),
    "focalnet": ("FocalNet", IMAGES, {"image_size": 32, "patch_size": 4, "embed_dim": 16,
                 "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3],
                 "hidden_sizes": [16, 32], "num_labels": 5}, image()),
    "levit": ("Levit", IMAGES, {"image_size": 64, "hidden_sizes": [16, 24, 32],
              "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
              "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2], "num_labels": 5}, image(64)),
    "siglip": ("Siglip", IMAGES, {"vision_config": VISION}, image()),
    "clip": ("CLIP", IMAGES, {"vision_config": VISION}, image()),
    "data2vec_vision": ("Data2VecVision", IMAGES, VISION, image()),
    "ijepa": ("IJepa", IMAGES, VISION, image()),
    "mobilevitv2": ("MobileViTV2", IMAGES, {"image_size": 64, "width_multiplier": 0.25,
                    "base_attn_unit_dims": [64, 64, 64], "n_attn_blocks": [1, 1, 1],
                    "num_labels": 5}, image(64)),
    "hiera": ("Hiera", IMAGES, {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1],
              "num_heads": [2, 4], "masked_unit_size": [4, 4], "query_stride": [2, 2],
              "num_query_pool": 1, "masked_unit_attention": [True, False],
              "patch_kernel": [7, 7], "num_labels": 5}, image()),
    "swiftformer": ("SwiftFormer", IMAGES, {"image_size": 64, "depths": [1, 1, 1, 1],
                    "embed_dims": [12, 16, 20, 24], "mlp_ratio": 2, "num_labels": 5}, image(64)),
    "pvt_v2": ("PvtV2", IMAGES, {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1],
               "sr_ratios": [2, 1], "hidden_sizes": [16, 24], "patch_sizes": [7, 3],
               "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
               "num_labels": 5}, image()),
    "textnet": ("TextNet", IMAGES, {"stem_out_channels": 12, "hidden_sizes": [12, 16, 20, 24],
                "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [3, 1]], [[1, 3]]],
                "conv_layer_strides": [[1], [2, 1], [2]], "num_labels": 5}, image()),
    "glpn": ("GLPN", "ForDepthEstimation", {"num_encoder_blocks": 4, "depths": [1, 1, 1, 1],
             "sr_ratios": [2, 2, 1, 1], "hidden_sizes": [8, 12, 16, 24],
             "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2],
             "decoder_hidden_size": 16}, image(64)),
    "videomae": ("VideoMAE", "ForVideoClassification", {**VISION, "num_frames": 4},
                 spectrum("pixel_values", 4, 3, 32, 32)),
    "timesformer": ("Timesformer", "ForVideoClassification", {**VISION, "num_frames": 3},
                    spectrum("pixel_values", 3, 3, 32, 32)),
    "vivit": ("Vivit", "ForVideoClassification", {**VISION, "num_frames": 4,
              "tubelet_size": [2, 8, 8]}, spectrum("pixel_values", 4, 3, 32, 32)),
    "yolos": ("Yolos", "ForObjectDetection", {**VISION, "image_size": [32, 32],
              "num_detection_tokens": 4}, image()),
    "vit_msn": ("ViTMSN", IMAGES, VISION, image()),
}  # fmt: skip
SOUND_MODELS: dict[str, Row] = {
    "wav2vec2": ("Wav2Vec2", CLASSIFY, SPEECH, wave()),
    "wav2vec2_ctc": ("Wav2Vec2", "ForCTC", {**SPEECH, "feat_extract_norm": "layer",
                     "do_stable_layer_norm": True}, wave()),
    "hubert": ("Hubert", CLASSIFY, SPEECH, wave()),
    "wavlm": ("WavLM", CLASSIFY, SPEECH, wave()),
    "data2vec_audio": ("Data2VecAudio", CLASSIFY, {**SPEECH, "num_conv_pos_embeddings": 2,
                       "conv_pos_kernel_size": 5}, wave()),
    "unispeech": ("UniSpeech", CLASSIFY, SPEECH, wave()),
    "sew": ("SEW", CLASSIFY, {**SPEECH, "squeeze_factor": 2}, wave()),
    "wav2vec2_bert": ("Wav2Vec2Bert", CLASSIFY, {**TINY, "feature_projection_input_dim": 20,
                      "conv_depthwise_kernel_size": 5, "classifier_proj_size": 24,
                      "left_max_position_embeddings": 6, "right_max_position_embeddings": 3,
                      "num_labels": 5}, spectrum("input_features", 16, 20)),
    "wav2vec2_conformer": ("Wav2Vec2Conformer", CLASSIFY, {**SPEECH,
                           "position_embeddings_type": "rotary",
                           "conv_depthwise_kernel_size": 5}, wave()),
    "ast": ("AST", "ForAudioClassification", {**VISION, "max_length": 32, "num_mel_bins": 16,
            "frequency_stride": 8, "time_stride": 8}, spectrum("input_values", 32, 16)),
    "whisper_encoder": ("Whisper", "ForAudioClassification", {**SEQ2SEQ, "num_mel_bins": 20,
                        "max_source_positions": 20, "max_target_positions": 16,
                        "classifier_proj_size": 24, "num_labels": 5},
                        spectrum("input_features", 20, 40)),
}  # fmt: skip
ARCHITECTURES = ENCODERS | DECODERS | PAIRS | IMAGE_MODELS | SOUND_MODELS


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The architecture `name` in eval mode, with inputs for a batch of two."""
    import transformers

    transformers.logging.set_verbosity_error()
    prefix, head, keys, inputs = ARCHITECTURES[name]
    first, _, prefix = prefix.rpartition("|")
    configuration = getattr(transformers, f"{first or prefix}Config")(**keys)
    configuration.use_cache = False
    configuration.layerdrop = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}{head}")(configuration)
        given = inputs()
    return Logits(model.eval(), tuple(given)), tuple(given.values())


class Logits(nn.Module):
    """Keeps the tensor that the model is for, and drops hidden states and caches.

    Hidden states that a model hands out beside its logits would be outputs, and freeze the
    residual stream.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        given = (first,) if second is None else (first, second)
        output = self.model(**dict(zip(self.names, given, strict=True)))
        return output["logits"] if "logits" in output else output[0]
