"""How fast the methods write and learn on this machine, beside what the machine allows."""
