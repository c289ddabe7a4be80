package main

import (
	"slices"
	"strings"
	"testing"
)

var trades = Table{"public", "trades"}

// history is two transactions: rows a and b are inserted, then a is updated, b gets the key c, and d comes and goes.
func history() (*Ledger, []Record) {
	row := func(key, price string) []Column {
		return []Column{{Name: "id", Value: key}, {Name: "price", Value: price}}
	}
	ledger := &Ledger{Entries: map[EntryID]Entry{}, Rows: map[RowKey]string{
		{trades, "a"}:     digestRow(row("a", "2")),
		{trades, "c"}:     digestRow(row("c", "1")),
		{trades, "older"}: "of a row that was there before the ledger began",
	}}
	var records []Record
	change := func(transaction uint32, ordinal uint64, operation, key, oldKey, price string) {
		entry := Entry{Table: trades, Operation: operation, Key: key, OldKey: oldKey}
		var after []Column
		if operation != "D" {
			after = row(key, price)
			entry.Digest = digestRow(after)
		}
		ledger.Entries[EntryID{transaction, ordinal}] = entry
		for number, part := range expected(entry) {
			coordinate := Coordinate{1, uint64(transaction) << 8, ordinal, uint32(number)}
			change := &Change{
				Coordinate: coordinate, Transaction: transaction, Operation: part.operation, Table: trades,
				Key: part.key, KeyChanged: oldKey != "",
			}
			if part.operation != "D" {
				change.After, change.OldKey = slices.Clone(after), oldKey
			}
			records = append(records, Record{
				Place: "t[0]@" + coordinate.String(), Lane: "t[0]", Coordinate: coordinate, Key: part.key,
				Value: []byte(coordinate.String()), Millis: int64(1000 + transaction), Change: change,
			})
		}
	}
	change(7, 0, "I", "a", "", "1")
	change(7, 1, "I", "b", "", "1")
	change(9, 0, "U", "a", "", "2")
	change(9, 1, "U", "c", "b", "1")
	change(9, 2, "I", "d", "", "1")
	change(9, 3, "D", "d", "", "")
	return ledger, records
}

func TestAgreement(t *testing.T) {
	ledger, records := history()
	var differences Differences
	totals := CompareSink(ledger, records, &differences)
	if differences.Count != 0 {
		t.Fatalf("differences: %q", differences.First)
	}
	if want := LedgerTotals(ledger); totals != want {
		t.Errorf("totals %+v, the ledger has %+v", totals, want)
	}
	if totals.Changes != 6 || totals.Inserts != 3 || totals.Updates != 2 || totals.Deletes != 1 || totals.Keys != 2 {
		t.Errorf("totals %+v", totals)
	}
	if ledger.RecordCount() != len(records) {
		t.Errorf("%d records expected, there are %d", ledger.RecordCount(), len(records))
	}
}

// Each way to be wrong is found, and said.
func TestDifferences(t *testing.T) {
	tests := map[string]struct {
		damage func(ledger *Ledger, records []Record) []Record
		want   string
	}{
		"missing": {
			func(_ *Ledger, r []Record) []Record { return slices.Delete(r, 1, 2) },
			"missing: transaction 7 change 1 (I public.trades b) has 0 of 1 records",
		},
		"half of a key change missing": {
			func(_ *Ledger, r []Record) []Record { return slices.Delete(r, 3, 4) },
			"missing: transaction 9 change 1 (U public.trades c) has 1 of 2 records",
		},
		"everything missing": {
			func(*Ledger, []Record) []Record { return nil },
			"has 0 of 1 records",
		},
		"duplicate": {
			func(_ *Ledger, r []Record) []Record { return append(r, r[2]) },
			"duplicate: 1:0/900:0",
		},
		"duplicate in another partition": {
			func(_ *Ledger, r []Record) []Record {
				again := r[2]
				again.Lane = "t[1]"
				return append(r, again)
			},
			"duplicate: 1:0/900:0",
		},
		"duplicate under a new coordinate": {
			func(_ *Ledger, r []Record) []Record {
				for _, again := range slices.Clone(r[2:]) {
					change := *again.Change
					change.Coordinate.LSN++
					again.Coordinate, again.Change = change.Coordinate, &change
					r = append(r, again)
				}
				return r
			},
			"transaction 9 is both at 1:900 and at 1:0/901:0",
		},
		"reordered": {
			func(_ *Ledger, r []Record) []Record {
				r[0], r[1] = r[1], r[0]
				return r
			},
			"out of order: 1:0/700:0",
		},
		"altered value": {
			func(_ *Ledger, r []Record) []Record {
				r[2].Change.After[1].Value = "3"
				return r
			},
			"the ledger says U of a with digest",
		},
		"value taken for NULL": {
			func(_ *Ledger, r []Record) []Record {
				r[2].Change.After[1] = Column{Name: "price", Null: true}
				return r
			},
			"the ledger says U of a with digest",
		},
		"other operation": {
			func(_ *Ledger, r []Record) []Record {
				r[2].Change.Operation = "I"
				return r
			},
			"I of a with digest",
		},
		"other table": {
			func(_ *Ledger, r []Record) []Record {
				r[2].Change.Table.Name = "orders"
				return r
			},
			"of table public.orders, the ledger says public.trades",
		},
		"other key outside than inside": {
			func(_ *Ledger, r []Record) []Record {
				r[2].Key = "b"
				return r
			},
			`filed under the key "b", but its value says "a"`,
		},
		"other coordinate outside than inside": {
			func(_ *Ledger, r []Record) []Record {
				r[2].Change.Coordinate.Epoch = 2
				return r
			},
			"filed as 1:0/900:0, but its value says 2:0/900:0",
		},
		"rolled back": {
			func(l *Ledger, r []Record) []Record {
				delete(l.Entries, EntryID{9, 3})
				return r
			},
			"not in the ledger: D public.trades 1:0/900:3 of transaction 9",
		},
		"part too many": {
			func(_ *Ledger, r []Record) []Record {
				more := *r[2].Change
				more.Coordinate.Part = 1
				again := r[2]
				again.Coordinate, again.Change = more.Coordinate, &more
				return slices.Insert(r, 3, again)
			},
			"the change has 1 records",
		},
		"key change not said": {
			func(_ *Ledger, r []Record) []Record {
				r[4].Change.KeyChanged = false
				return r
			},
			"the change of the key",
		},
		"timestamp goes back": {
			func(_ *Ledger, r []Record) []Record {
				r[1].Millis = 1
				return r
			},
			"the timestamp goes back",
		},
		"two transactions at one place": {
			func(_ *Ledger, r []Record) []Record {
				r[1].Change.Transaction = 9
				return r
			},
			"belongs to both transaction 7 and 9",
		},
		"row changed behind the log's back": {
			func(l *Ledger, r []Record) []Record {
				l.Rows[RowKey{trades, "a"}] = "altered"
				return r
			},
			"public.trades a differs",
		},
		"row gone behind the log's back": {
			func(l *Ledger, r []Record) []Record {
				delete(l.Rows, RowKey{trades, "a"})
				return r
			},
			"is there by the log, but not in the table",
		},
		"row there behind the log's back": {
			func(l *Ledger, r []Record) []Record {
				l.Rows[RowKey{trades, "d"}] = "new"
				return r
			},
			"is in the table, but not by the log",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			ledger, records := history()
			var differences Differences
			CompareSink(ledger, test.damage(ledger, records), &differences)
			if !slices.ContainsFunc(differences.First, func(line string) bool { return strings.Contains(line, test.want) }) {
				t.Errorf("no difference says %q: %q", test.want, differences.First)
			}
		})
	}
}

func TestUnsaidValuesAreWhatTheyWere(t *testing.T) {
	ledger, records := history()
	records[2].Change.After[0] = Column{Name: "id", Unsaid: true}
	records[4].Change.After[1] = Column{Name: "price", Unsaid: true}
	var differences Differences
	CompareSink(ledger, records, &differences)
	if differences.Count != 0 {
		t.Errorf("differences: %q", differences.First)
	}

	records[0].Change.After[1] = Column{Name: "price", Unsaid: true}
	CompareSink(ledger, records, &differences)
	if differences.Count == 0 {
		t.Error("a value that nobody ever said passed")
	}
}

func TestTruncateEmptiesItsTable(t *testing.T) {
	ledger, records := history()
	coordinate := Coordinate{1, 11 << 8, 0, 0}
	ledger.Entries[EntryID{11, 0}] = Entry{Table: trades, Operation: "T"}
	ledger.Rows = nil
	records = append(records, Record{
		Lane: "t[0]", Coordinate: coordinate, Millis: 2000,
		Change: &Change{Coordinate: coordinate, Transaction: 11, Operation: "T", Table: trades},
	})
	var differences Differences
	totals := CompareSink(ledger, records, &differences)
	if differences.Count != 0 || totals.Truncates != 1 || totals.Keys != 0 {
		t.Errorf("%+v, differences: %q", totals, differences.First)
	}
}

func TestSnapshotRowsAreWhatTheChangesComeTo(t *testing.T) {
	for price, agree := range map[string]bool{"2": true, "1": false} {
		ledger, records := history()
		at := func(ordinal uint64, operation string) Record {
			coordinate := Coordinate{1, 9<<8 + 1, ordinal, 0}
			return Record{Lane: "t[0]", Coordinate: coordinate, Millis: 2000, Change: &Change{
				Coordinate: coordinate, Operation: operation, Table: trades,
			}}
		}
		read := at(1, "R")
		read.Key, read.Change.Key = "a", "a"
		read.Change.After = []Column{{Name: "id", Value: "a"}, {Name: "price", Value: price}}
		records = append(records, at(0, "B"), read, at(2, "E"))
		var differences Differences
		totals := CompareSink(ledger, records, &differences)
		if (differences.Count == 0) != agree {
			t.Errorf("price %s: differences: %q", price, differences.First)
		}
		if agree && totals != LedgerTotals(ledger) {
			t.Errorf("a row of a snapshot was counted as a change: %+v", totals)
		}
	}
}

func TestASchemaChangesRightBeforeTheFirstRecordThatHasIt(t *testing.T) {
	tests := map[string]struct {
		damage func(records []Record) []Record
		want   string
	}{
		"as it should be": {func(records []Record) []Record { return records }, ""},
		"no event":        {func(records []Record) []Record { return slices.Delete(records, 2, 3) }, "the schema is version 2, and was said to be 1"},
		"twice": {func(records []Record) []Record {
			again := *records[2].Change
			again.Coordinate = Coordinate{1, 9 << 8, 0, 2}
			return slices.Insert(records, 4, Record{Lane: "t[0]", Coordinate: again.Coordinate, Millis: 1009, Change: &again})
		}, "version 2 of the schema follows version 1"},
		"a version is left out": {func(records []Record) []Record {
			records[2].Change.OldSchemaVersion = 0
			return records
		}, "version 2 of the schema follows version 0"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			ledger, records := history()
			for _, record := range records {
				record.Change.SchemaVersion = 1
			}
			// The second transaction begins with another schema: its first change is part 1 of its coordinate.
			event := Record{Lane: "t[0]", Coordinate: Coordinate{1, 9 << 8, 0, 0}, Millis: 1009}
			event.Change = &Change{Coordinate: event.Coordinate, Transaction: 9, Operation: "S", Table: trades, SchemaVersion: 2, OldSchemaVersion: 1}
			for _, record := range records[2:] {
				record.Change.SchemaVersion = 2
			}
			records[2].Coordinate.Part, records[2].Change.Coordinate.Part = 1, 1
			var differences Differences
			totals := CompareSink(ledger, test.damage(slices.Insert(records, 2, event)), &differences)
			if test.want == "" && (differences.Count != 0 || totals.Schemas != 1 || totals.Changes != 6) {
				t.Errorf("%+v, differences: %q", totals, differences.First)
			}
			if !strings.Contains(strings.Join(differences.First, "\n"), test.want) {
				t.Errorf("differences: %q, wanted %q", differences.First, test.want)
			}
		})
	}
}

func TestSinksHoldTheSameBytes(t *testing.T) {
	_, kafka := history()
	_, redis := history()
	var differences Differences
	CompareValues(kafka, redis, &differences)
	if differences.Count != 0 {
		t.Errorf("differences: %q", differences.First)
	}
	redis[3].Value = []byte("other")
	CompareValues(kafka, redis, &differences)
	if differences.Count != 1 {
		t.Errorf("%d differences", differences.Count)
	}
}

func TestReportSaysWhetherAllAgree(t *testing.T) {
	ledger, records := history()
	for _, test := range []struct {
		records []Record
		want    bool
		word    string
	}{{records, true, "yes"}, {records[1:], false, "NO"}} {
		result := &Result{Name: "kafka"}
		result.Totals = CompareSink(ledger, test.records, &result.Differences)
		var out strings.Builder
		agree := write(&out, LedgerTotals(ledger), []*Result{result})
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if agree != test.want || !strings.Contains(out.String(), test.word) {
			t.Errorf("agree = %t:\n%s", agree, out.String())
		}
		if last := lines[len(lines)-1]; !strings.HasPrefix(last, `{"agree":`) {
			t.Errorf("the last line is %s", last)
		}
	}
}

func TestRowsHaveTheColumnsThatTheirTableHasFromThenOn(t *testing.T) {
	ledger, records := history()
	// After the first transaction the table has another column instead of the price.
	row := func(key string) []Column { return []Column{{Name: "id", Value: key}, {Name: "fee", Null: true}} }
	event := Record{Lane: "t[0]", Coordinate: Coordinate{1, 8 << 8, 0, 0}, Millis: 1008}
	event.Change = &Change{
		Coordinate: event.Coordinate, Operation: "S", Table: trades, SchemaVersion: 1, OldSchemaVersion: 0, Columns: []string{"id", "fee"},
	}
	for id := range ledger.Entries {
		if id.Transaction == 9 {
			delete(ledger.Entries, id)
		}
	}
	for _, record := range records[:2] {
		record.Change.SchemaVersion = 0
	}
	ledger.Rows = map[RowKey]string{{trades, "a"}: digestRow(row("a")), {trades, "b"}: digestRow(row("b"))}
	var differences Differences
	CompareSink(ledger, append(records[:2:2], event), &differences)
	if differences.Count != 0 {
		t.Errorf("differences: %q", differences.First)
	}
}
