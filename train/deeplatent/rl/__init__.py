"""Reinforcement learning of DeepLatent: GRPO over words and over the modulation of latent blocks."""
