"""Which families of models work with which carriers."""
