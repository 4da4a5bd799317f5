"""The bytes of one value in each precision."""

FLOAT16_BYTES = 2
FLOAT32_BYTES = 4
# Weights and activations, by the values of `precision`.
VALUE_BYTES = {"fp32": FLOAT32_BYTES, "tf32": FLOAT32_BYTES, "bf16": FLOAT16_BYTES, "fp16": FLOAT16_BYTES}
