"""What all operators share: their base class and registry, argument checks, targets, and their place in torch."""
