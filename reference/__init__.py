"""The judge: GLM-4.7-Flash and its `deepseek2` relatives, written plainly in float32, independent of the product."""
