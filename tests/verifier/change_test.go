package main

import (
	"context"
	"math"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"
)

func encode(t *testing.T, decoder *Decoder, text string) []byte {
	t.Helper()
	record := dynamicpb.NewMessage(decoder.record)
	if err := prototext.Unmarshal([]byte(text), record); err != nil {
		t.Fatal(err)
	}
	value, err := proto.Marshal(record)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func newDecoder(t *testing.T) *Decoder {
	t.Helper()
	decoder, err := NewDecoder(context.Background(), "../../proto")
	if err != nil {
		t.Fatal(err)
	}
	return decoder
}

func TestDecode(t *testing.T) {
	decoder := newDecoder(t)
	got, err := decoder.Decode(encode(t, decoder, `
		coordinate { epoch: 1 commit_lsn: 23803720 ordinal: 3 part: 1 }
		operation: OPERATION_UPDATE
		relation {
			schema: "public" table: "trades"
			columns { name: "id" type_name: "int4" key: true }
			columns { name: "ok" } columns { name: "f4" } columns { name: "f8" } columns { name: "raw" }
			columns { name: "at" type_name: "timestamptz" key: true }
			columns { name: "none" } columns { name: "same" }
		}
		before {
			values { integer: 4 } values { absent: 2 } values { absent: 2 } values { absent: 2 } values { absent: 2 }
			values { text: "now" } values { absent: 2 } values { absent: 2 }
		}
		after {
			values { integer: -5 } values { boolean: true } values { float4: 0.1 } values { float8: 1e20 } values { binary: "\x00\xff" }
			values { text: "a\"b" } values {} values { absent: 1 }
		}
		commit_time_micros: 1795246431793000 transaction_id: 77 key_changed: true`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Change{
		Coordinate: Coordinate{1, 0x16B3748, 3, 1}, Transaction: 77, Operation: "U", Table: trades,
		Key: `{"id":"-5","at":"a\"b"}`, OldKey: `{"id":"4","at":"now"}`,
		After: []Column{
			{Name: "id", Value: "-5"}, {Name: "ok", Value: "t"}, {Name: "f4", Value: "0.1"}, {Name: "f8", Value: "1e+20"},
			{Name: "raw", Value: `\x00ff`}, {Name: "at", Value: `a"b`}, {Name: "none", Null: true}, {Name: "same", Unsaid: true},
		},
		CommitMicros: 1795246431793000, KeyChanged: true,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestDecodeRefuses(t *testing.T) {
	decoder := newDecoder(t)
	for name, value := range map[string][]byte{
		"no message":   []byte("\xff"),
		"no operation": encode(t, decoder, `transaction_id: 1`),
		"a value that was left out for its size": encode(t, decoder,
			`operation: OPERATION_INSERT relation { columns { name: "id" } } after { values { absent: 3 } }`),
		"too few values": encode(t, decoder, `operation: OPERATION_INSERT relation { columns { name: "id" } } after {}`),
	} {
		if change, err := decoder.Decode(value); err == nil {
			t.Errorf("%s: %+v", name, change)
		}
	}
}

// As PostgreSQL 15 writes them.
func TestFormatFloat(t *testing.T) {
	for _, test := range []struct {
		value float64
		bits  int
		want  string
	}{
		{0.1, 64, "0.1"}, {-1.5, 64, "-1.5"}, {123456789012345, 64, "123456789012345"}, {1e15, 64, "1e+15"},
		{0.0001, 64, "0.0001"}, {0.00001, 64, "1e-05"}, {1e300, 64, "1e+300"}, {math.Copysign(0, -1), 64, "-0"},
		{math.NaN(), 64, "NaN"}, {math.Inf(-1), 64, "-Infinity"},
		{float64(float32(0.1)), 32, "0.1"}, {123456, 32, "123456"}, {1e6, 32, "1e+06"},
	} {
		if got := formatFloat(test.value, test.bits); got != test.want {
			t.Errorf("%v is written %s, want %s", test.value, got, test.want)
		}
	}
}

func TestJSONStringEscapesAsPostgreSQLDoes(t *testing.T) {
	if got, want := jsonString("<é\u2028\"\\\n\x01>"), "\"<é\u2028\\\"\\\\\\n\\u0001>\""; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestPositionsAndEntryIDs(t *testing.T) {
	position, err := parsePosition("1:0/16B3748:3")
	if want := (Coordinate{1, 0x16B3748, 3, 0}); err != nil || position != want {
		t.Errorf("%+v, %v", position, err)
	}
	if text := position.String(); text != "1:0/16B3748:3" {
		t.Error(text)
	}
	for _, text := range []string{"", "1:0/16B3748", "1:16B3748:3", "1:0/16B3748:3:4", "x:0/1:1"} {
		if position, err := parsePosition(text); err == nil {
			t.Errorf("%q was read as %s", text, position)
		}
	}
	// 2<<56 | 0x1_00000000, 3<<8 | 1
	id, err := parseEntryID("144115192370823168-769")
	if want := (Coordinate{2, 1 << 32, 3, 1}); err != nil || id != want {
		t.Errorf("%+v, %v", id, err)
	}
	if _, err := parseEntryID("1"); err == nil {
		t.Error("an id without a sequence was read")
	}
}

func TestSinkName(t *testing.T) {
	if got := sinkName("shop", Table{"public", "Odd näme"}); got != "shop.public.Odd_n_me" {
		t.Error(got)
	}
}

// Programs in every language are made from these files, by compilers that are stricter than ours.
func TestEveryProtoFileCompilesForClients(t *testing.T) {
	files, err := filepath.Glob("../../proto/meander/v1/*.proto")
	if err != nil || len(files) < 3 {
		t.Fatalf("found %v: %v", files, err)
	}
	compiler := protocompile.Compiler{Resolver: &protocompile.SourceResolver{ImportPaths: []string{"../../proto"}}}
	for _, file := range files {
		if _, err := compiler.Compile(t.Context(), strings.TrimPrefix(file, "../../proto/")); err != nil {
			t.Error(err)
		}
	}
}
