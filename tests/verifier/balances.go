package main

import (
	"slices"
	"strconv"
)

// balances are the columns whose sums TPC-B keeps equal: each of its transactions adds the same to one row of each.
var balances = map[string]string{
	"pgbench_accounts": "abalance",
	"pgbench_tellers":  "tbalance",
	"pgbench_branches": "bbalance",
	"pgbench_history":  "delta",
}

// checkBalances checks that in what the records come to the sums of TPC-B are equal, where its tables are captured. Rows that no record
// speaks of have what they began with, which is nothing.
func checkBalances(image Image, differences *Differences) {
	sums := map[string]int64{}
	for place, row := range image {
		column, found := balances[place.Table.Name]
		if !found {
			continue
		}
		index := slices.IndexFunc(row, func(c Column) bool { return c.Name == column })
		if index < 0 {
			differences.add("%s has no column %s", place, column)
			return
		}
		balance, err := strconv.ParseInt(row[index].Value, 10, 64)
		if err != nil {
			differences.add("%s: %s is no number: %q", place, column, row[index].Value)
			return
		}
		sums[place.Table.Name] += balance
	}
	for table, sum := range sums {
		if history := sums["pgbench_history"]; sum != history {
			differences.add("the balances of %s come to %d, those of pgbench_history to %d", table, sum, history)
		}
	}
}
