"""What a checkpoint is: its config, its weights, its network, and pictures and text to tokens and back."""
