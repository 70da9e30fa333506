"""What compilers make of every GPU kernel, without a GPU; the tables are kept in benchmarks/results/compile."""
