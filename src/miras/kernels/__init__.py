"""Optional fast paths, registered in `miras.engine.dispatch`; the choices know nothing of them."""
