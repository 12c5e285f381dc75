"""Networks: what one forward pass sees (`batch`), what a network is (`config`), and the networks."""
