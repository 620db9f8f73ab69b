"""What all operators share: base class and registry, argument checks, targets, and registration with torch."""
