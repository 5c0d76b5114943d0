"""What a seated adapter makes of a host's next token: seats, predictors, scores."""
