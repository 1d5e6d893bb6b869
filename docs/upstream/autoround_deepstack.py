"""Block-wise tuning of Qwen3-VL misses what deepstack adds between blocks."""

import torch
from auto_round import AutoRound
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

torch.manual_seed(0)
common = {"hidden_size": 64, "intermediate_size": 64}
rope = {"rope_type": "default", "mrope_section": [8, 4, 4]}
text = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
text |= {"vocab_size": 128, "rope_scaling": rope, **common}
vision = {"depth": 3, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1]}
config = Qwen3VLConfig(text_config=text, vision_config=vision | common, image_token_id=1)
model = Qwen3VLForConditionalGeneration(config).eval()
ids = torch.tensor([[1] * 16 + list(range(10, 26))])  # an image of 16 visual tokens, 16 of text
sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
sample |= {"pixel_values": torch.randn(64, 1536), "image_grid_thw": torch.tensor([[1, 8, 8]])}
sample["mm_token_type_ids"] = (ids == 1).int()
inputs = []  # what decoder layer 1 is given
norm = model.model.language_model.layers[1].input_layernorm
norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
with torch.no_grad():
    model(**sample)
options = {"iters": 1, "amp": False, "enable_quanted_input": False, "enable_torch_compile": False}
blocks = "model.language_model.layers"
AutoRound(model, tokenizer="", processor="", dataset=[sample], nsamples=1, batch_size=1, group_size=32,
          device_map="cpu", to_quant_block_names=blocks, **options).quantize()  # fmt: skip
for kind, mask in (("text", ids[0] != 1), ("visual", ids[0] == 1)):
    true, tuned = inputs[0][0, mask], inputs[1][0, mask]
    print(f"{kind} tokens: relative error {float((tuned - true).norm() / true.norm()):.3f}")
