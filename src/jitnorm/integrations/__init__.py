"""What plugs jitnorm into other projects, a module each."""
