"""Text, and what it tells: sensitivities, scores, evaluation."""
