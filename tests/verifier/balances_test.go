package main

import (
	"strings"
	"testing"
)

func TestBalancesThatDoNotComeToTheSameAreFound(t *testing.T) {
	for delta, agree := range map[string]bool{"-7": true, "-6": false} {
		image := Image{}
		put := func(table, key, value string) {
			image[RowKey{Table{"public", table}, key}] = []Column{{Name: "id", Value: key}, {Name: balances[table], Value: value}}
		}
		put("pgbench_accounts", "1", "5")
		put("pgbench_accounts", "2", "-12")
		put("pgbench_tellers", "1", "-7")
		put("pgbench_branches", "1", "-7")
		put("pgbench_history", "1", delta)
		var differences Differences
		checkBalances(image, &differences)
		if (differences.Count == 0) != agree {
			t.Errorf("delta %s: differences: %q", delta, differences.First)
		}
		if !agree && !strings.Contains(strings.Join(differences.First, "\n"), "of pgbench_accounts come to -7, those of pgbench_history to -6") {
			t.Errorf("differences: %q", differences.First)
		}
	}
}
