package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"
)

// Result is what is known of one store.
type Result struct {
	Name        string
	Totals      Totals
	Differences Differences
}

// write prints the stores side by side, the first differences, and as the last line a JSON object. It says whether all agree.
func write(out io.Writer, ledger Totals, sinks []*Result) bool {
	table := tabwriter.NewWriter(out, 0, 0, 3, ' ', tabwriter.AlignRight)
	line := func(name string, of func(Totals) string) {
		fmt.Fprintf(table, "%s\t%s\t", name, of(ledger))
		for _, sink := range sinks {
			fmt.Fprintf(table, "%s\t", of(sink.Totals))
		}
		fmt.Fprintln(table)
	}
	fmt.Fprint(table, "\tPostgreSQL\t")
	for _, sink := range sinks {
		fmt.Fprintf(table, "%s\t", sink.Name)
	}
	fmt.Fprintln(table)
	line("changes", func(t Totals) string { return strconv.Itoa(t.Changes) })
	line("inserts", func(t Totals) string { return strconv.Itoa(t.Inserts) })
	line("updates", func(t Totals) string { return strconv.Itoa(t.Updates) })
	line("deletes", func(t Totals) string { return strconv.Itoa(t.Deletes) })
	line("truncates", func(t Totals) string { return strconv.Itoa(t.Truncates) })
	line("keys", func(t Totals) string { return strconv.Itoa(t.Keys) })
	line("digest of all keys", func(t Totals) string { return t.Digest[:12] })
	agree := true
	answer := map[string]any{"postgres": ledger}
	fmt.Fprint(table, "agrees\t\t")
	for _, sink := range sinks {
		word := "yes"
		if sink.Differences.Count > 0 {
			word, agree = "NO", false
		}
		fmt.Fprintf(table, "%s\t", word)
		answer[sink.Name] = struct {
			Totals
			Differences int `json:"differences"`
		}{sink.Totals, sink.Differences.Count}
	}
	fmt.Fprintln(table)
	table.Flush()

	for _, sink := range sinks {
		if sink.Differences.Count == 0 {
			continue
		}
		fmt.Fprintf(out, "\n%s: %d differences, the first are\n", sink.Name, sink.Differences.Count)
		for _, difference := range sink.Differences.First {
			fmt.Fprintf(out, "  %s\n", difference)
		}
	}
	answer["agree"] = agree
	// Maps and structs of numbers and strings always have a form in JSON.
	text, _ := json.Marshal(answer)
	fmt.Fprintf(out, "\n%s\n", text)
	return agree
}
