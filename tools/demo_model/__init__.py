"""The demo model: a renderer of driving scenes, exact questions, training, export and evaluation."""
