"""Matrix products, one number format a file: packing, reference and candidates together."""
